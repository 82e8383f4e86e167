"""First principles and scaling laws: `plan napkin` and `plan scaling`."""
