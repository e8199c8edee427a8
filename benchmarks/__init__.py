"""Latency, memory and distance to the limit, of each op and of its peers: ``python -m benchmarks --help``."""
