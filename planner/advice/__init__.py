"""Questions about a plan: why this one, why not another, what would help, what is left after a loss.

In go a Plan or an infeasible problem; out come explanations, comparisons and repairs, each found by
solving a changed problem again. Open `explain.py` first.
"""
