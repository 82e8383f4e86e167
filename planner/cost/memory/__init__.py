"""Bytes of activations that a layer saves, and of weights, gradients and optimizer state.

In go a layer class, its shard, the engine and the precision; out come bytes, from samples where there are
some. Open `activations.py` first.
"""
