"""Measured runs: the table runs.csv, and what each row says of a planning problem and a strategy."""
