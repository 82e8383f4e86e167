"""Commands that ask how true predictions are: calibrate and validate.

Each reads rows of runs.csv, fits or compares, and prints errors. Open `validate.py` first.
"""
