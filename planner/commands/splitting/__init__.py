"""Commands that ask how to split a model: solve, estimate, explain, diff, check, import, export.

Each reads a problem or plan.json, calls the search or the cost model, and prints the answer. Open
`solve.py` first.
"""
