"""Weights in Hugging Face's format: their names for every family, read into any layout, and written.

In goes a folder of safetensors; out come tensors of the runtime's modules, each rank reading only its
slices, and the way back. Open `key_map.py` first.
"""
