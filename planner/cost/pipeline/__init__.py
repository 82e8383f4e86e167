"""Time of a pipeline step: the replay of a schedule table, and paths through it that bound its length.

In go a table of actions and the seconds of every stage's passes; out come the start and end of every
action, the step time, and what decides it. Open `simulate.py` first.
"""
