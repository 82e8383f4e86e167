"""Fitting the cost model to measured runs, and comparing predictions with measurements.

In go rows of runs.csv; out come a profile of fitted constants (`calibrate`), and errors, intervals and
regret (`validate`). Open `calibrate.py` first.
"""
