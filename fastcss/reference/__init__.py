"""Writes the equations in plain PyTorch: the oracle of every test, and ``impl="reference"``."""
