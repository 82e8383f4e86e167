"""Applies a plan's parallelism to modules: one `apply_*` function for each axis, always in the same order.

In go a stage's modules, the plan and the device meshes; out come modules that are sharded, recomputed,
offloaded and wrapped as the plan says. Open `parallelize.py` first.
"""
