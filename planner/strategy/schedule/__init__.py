"""Pipeline schedules as tables of actions: GPipe, 1F1B, interleaved and zero-bubble.

In go a schedule's name, stages and micro-batches; out comes for every pipeline rank the row of actions
that it runs, which the cost model replays and the runtime executes. Open `schedules.py` first.
"""
