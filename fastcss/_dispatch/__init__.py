"""Decides which implementation of an op runs, and how torch's autograd, transforms, modes and counters see it."""
