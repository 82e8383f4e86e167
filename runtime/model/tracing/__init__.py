"""Traces any `nn.Module` on fake tensors into the operator graph that the planner plans.

In go a factory of modules and the shapes of its inputs; out comes a ModelSpec. No memory, no data and no
device are needed. Open `trace.py` first.
"""
