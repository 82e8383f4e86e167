"""Weights in Hugging Face's format: what every family calls them, read into any layout, and written."""
