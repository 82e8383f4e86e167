"""Histories of training runs, as `plan train` and trackers leave them, made rows of runs.csv."""
