"""Finds the best strategy and proves how good it is: bounds, stage recipes and the integer programme.

In go a PlanningProblem and options such as a time limit; out come the best Strategy with its Estimate,
runners-up, and a certificate: a lower bound that no strategy of the space beats. Open `solve.py` first.
"""
