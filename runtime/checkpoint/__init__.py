"""Saves and loads the state of all ranks as safetensors and JSON, committed by hash and rename, no pickle.

In goes nested state of any parallel layout; out come step folders that are whole or do not count, and the
same state in any other layout. Open `store.py` first: it says how a checkpoint is committed and found.
"""
