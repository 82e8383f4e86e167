"""How many of which hardware: offers, options of them with their plans, and their comparison."""
