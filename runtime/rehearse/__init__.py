"""Runs single ranks of a plan on one device, without the other ranks.

In go a Plan and a rank; out come its measured memory and times, or its memory traced on fake tensors.
Open `rehearse.py` first.
"""
