"""Reads what a training run left behind into a row of runs.csv.

In goes the folder of a run: metrics of `plan train`, or files of Weights & Biases; out comes a Run, and a
list of what could not be found. Open `convert.py` first.
"""
