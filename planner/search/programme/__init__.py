"""The integer programme of one layout: which layers each pipeline stage holds, and how they recompute.

In go the stage options (the columns: layers, recomputation, time and bytes) and the memory of each rank; out
comes the assignment of least step time. Open `ilp.py` first: its docstring is the mathematical programme.
"""
