"""Starts the ranks of a run and joins them to one process group, and names the rank that dies or hangs.

In goes a function and a number of ranks; out come processes that run it, are watched, and end together.
Open `local_ranks.py` first.
"""
