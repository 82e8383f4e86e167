"""Executes a plan on torch.distributed, and measures devices. The only package here that imports torch."""
