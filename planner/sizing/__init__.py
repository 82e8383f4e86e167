"""Which hardware and how much of it: clusters, dollars and days for a training run.

In go a model, tokens, a deadline or budget, and offers of hardware; out come options with their plans,
days and dollars, and which of them nothing else beats. Open `search.py` first.
"""
