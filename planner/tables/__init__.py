"""Measured tables: collectives and matrix products by device and size."""
