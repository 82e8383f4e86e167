"""Measurements of the product itself: how right its predictions are, how fast its search is."""
