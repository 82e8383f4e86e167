"""The search: which strategies exist, bounds, stage recipes, the ILP, and the solver around them."""
