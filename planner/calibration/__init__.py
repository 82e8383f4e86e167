"""Calibration: the constants of the time model, fitted to measured runs."""
