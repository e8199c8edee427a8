"""Holds tiles that were measured to be the fastest: compute capability → sizes → tile; ``tuned.py`` reads them.

The table is empty until a GPU was measured, and the host code's own tiles run. ``python -m benchmarks.tune`` (``make
gpu-tune``) writes this file.
"""

TILES: dict[int, dict[str, dict[str, int | None]]] = {}
