"""A choice and its answer as values: parallel degrees, stages, schedule, estimate, plan.

In goes a Strategy; out come the rules that it breaks, where its ranks lie in the cluster, and the Plan
that is written to plan.json. Costs are computed elsewhere (`planner.cost`). Open `strategy.py` first.
"""
