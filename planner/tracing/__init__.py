"""Arbitrary modules as graphs of operators, cut into a chain of layer classes."""
