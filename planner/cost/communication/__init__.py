"""Time of collectives and messages: tensor, context, expert, data and pipeline parallelism.

In go a collective, its bytes and its group of ranks; out come seconds, and how much of them overlaps with
computation. Open `collectives.py` first: it holds the formula of every collective.
"""
