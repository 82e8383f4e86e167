"""Commands that run something on devices: demo, profile, train, rehearse, replan, report, trace, doctor.

Each checks its input without torch, then calls the runtime. Open `train.py` first.
"""
