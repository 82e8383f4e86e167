"""Prices: instances, catalogs of clouds, the user's own, cost on premises."""
