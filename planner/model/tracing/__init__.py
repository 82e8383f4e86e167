"""Turns any traced `nn.Module` into a ModelSpec: a graph of operators cut into a chain of layer classes.

In goes the operator graph that `runtime.model.tracing` records; out come layer classes with their
parameters, FLOPs and saved bytes, and the file that `--model` reads. Open `traced_model.py` first.
"""
