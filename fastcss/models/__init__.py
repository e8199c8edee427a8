"""Holds whole systems, and those of their parts that no other package offers separately."""
