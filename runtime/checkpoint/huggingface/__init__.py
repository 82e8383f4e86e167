"""A run's weights as a Hugging Face folder, with or without its adapters.

In goes a run's checkpoint; out comes a folder that transformers loads as it is. Open `export.py` first.
"""
