"""Bytes on one device: weights, gradients, optimizer state, activations, buffers, and whether they fit.

In go a stage and the micro-batches that are in flight; out come bytes by tenant at each moment of a step,
and the verdict SAFE, RISKY or NO. Open `memory_timeline.py` first.
"""
