"""Whether a plan fits into memory: bytes of a device at each moment of a step, against what it has.

In go stages and the micro-batches in flight; out come the peak by tenant, and the verdict SAFE, RISKY or
NO. Open `memory_timeline.py` first.
"""
