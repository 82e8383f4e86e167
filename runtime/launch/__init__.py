"""Starts the ranks of a run and lets them meet: processes, devices, process groups, timeouts.

In go a number of ranks and a function; out come running processes that are watched and ended together.
Open `local_ranks.py` first.
"""
