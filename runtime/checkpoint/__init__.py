"""Saves and loads the state of all ranks: safetensors and JSON, committed by hash and rename.

In goes nested state of any layout; out come step folders that are whole or do not count, and the same
state in any other layout. Open `store.py` first: it says how a checkpoint is committed.
"""
