"""Time of a pipeline step: the cost of each stage, and the replay of the schedule table with it.

In go a table of actions and the seconds of every stage's passes; out come the start and end of every
action, the step time, and what decides it. Open `simulate.py` first.
"""
