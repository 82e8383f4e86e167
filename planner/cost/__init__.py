"""Time and memory of a strategy, computed from the inputs alone.

In go a PlanningProblem and a Strategy; out comes an Estimate: step time by cause, memory by tenant, and
how much of both rests on measurement. Sub-rooms, lowest first: communication and compute, memory, stage,
fit and pipeline. Open `evaluate.py` first.
"""
