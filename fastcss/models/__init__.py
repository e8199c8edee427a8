"""Whole systems and the parts of them that other packages do not offer on their own."""
