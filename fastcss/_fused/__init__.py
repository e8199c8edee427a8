"""Modules that run on the fused ops: one file for each family, and ``table`` of what they take the places of."""
