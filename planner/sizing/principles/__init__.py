"""First principles and scaling laws: bytes, 6ND, days, and compute-optimal sizes.

In go a number of parameters, tokens, or a budget; out come figures each with its formula and source. Open
`napkin.py` first.
"""
