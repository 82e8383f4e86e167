"""Trains a plan on all its ranks: launch, data, optimizer, loop, metrics and summary.

In go a Plan and TrainOptions; out come metrics.jsonl, checkpoints and summary.json, with predicted beside
measured. Open `train.py` first.
"""
