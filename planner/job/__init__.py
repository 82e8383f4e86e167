"""What is asked: the planning problem, its limits and objective, job overheads and engine settings.

In go a model, a workload, a cluster, profiles and limits; out comes one frozen PlanningProblem, the input
of every estimate and every search. Open `problem.py` first.
"""
