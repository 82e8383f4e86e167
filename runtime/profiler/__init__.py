"""Measures layers, collectives, operators, host and memory of this machine into a Profile.

In go models, shard sizes and a time limit; out come samples that price plans, kept as they come. Open
`profiler.py` first.
"""
