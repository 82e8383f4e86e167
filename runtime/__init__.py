"""Shardwise's runtime: executes exactly the plan that the planner wrote, measures it, and profiles devices.

Rooms, lowest first: launch, model, parallel, checkpoint, check, train, profiler, rehearse. It reads
values of the planner (plans, models, schedule tables) and never its search.
"""
