"""What several commands share: options, the problem that they describe, and text for a terminal.

In go values of the command line; out come a PlanningProblem, an objective or overheads, and aligned
tables. Open `options.py` first.
"""
