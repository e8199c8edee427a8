"""The launchers of csrc/cuda/<op>.cu in Python, one file an op: for an installation without the compiled module.

A launcher lays the kernel's parameters out in the order of the struct in <op>.cuh, whose constants (``kThreads``, …) it
reads, and counts blocks. It gives what the launcher in C++ gives, to the bit: ``tests/native/test_cuda_values.py``.
"""

from .._dispatch.nvrtc import LAUNCHERS
from .._import_files import import_files
from .._schema import LIBRARY

import_files(__name__, __path__)


def register() -> None:
    """Give the raw ops these launchers as their CUDA implementation."""
    for op, launcher in LAUNCHERS.items():
        LIBRARY.impl(f"{op}.cuda", launcher, "CUDA")
