"""Time and memory of a strategy, computed from the inputs alone.

In go a PlanningProblem and a Strategy; out comes an Estimate: step time by cause, memory by tenant, and
how much of both rests on measurement. The sub-rooms are compute, communication, memory and pipeline. Open
`evaluate.py` first.
"""
