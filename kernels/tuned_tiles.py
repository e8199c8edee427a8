"""Compute capability → sizes → tile; see tuned.py. Written by ``python -m benchmarks.tune``, from what it measured."""

TILES: dict[int, dict[str, dict[str, int | None]]] = {}
