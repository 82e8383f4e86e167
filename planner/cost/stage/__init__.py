"""Time and memory of one pipeline stage, layer by layer, under the degrees of a strategy.

In go a layer class or a stage and its parallel degrees; out come seconds of each pass of a micro-batch,
work once a step, and the bytes that the stage holds. Open `stage.py` first.
"""
