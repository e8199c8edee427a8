"""Chooses how many tasks run side by side on a CPU.

More tasks side by side read the weights less often and start fewer ops, until their tensors grow too large. The limit
depends on the C library. By default glibc maps every tensor over 32 MB afresh and page-faults it in at every
use; after ``tune_malloc`` it keeps them, and only the caches set a limit. The table is for six tasks of Grounding
DINO's encoder on one thread of an AMD EPYC (Zen 5): CPU time of the PEFT loop ÷ ours.

    widest tensor of one task    memory    6      3      2      1 side by side
    28 MB (256×320)              glibc's   1.16   –      1.50   1.27
    28 MB                        tuned     1.79   –      1.61   1.27
    105 MB (480×640)             glibc's   1.27   1.27   1.22   1.55
    105 MB                       tuned     1.32   1.81   1.83   1.48
"""

from __future__ import annotations

import ctypes

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .task_rules import is_mapped

# Bytes of the widest tensor of a group. With the first limit nearly all tensors stay below glibc's mapping threshold.
WIDEST_MAPPED = 64 << 20
WIDEST_KEPT = 256 << 20
# Bytes, never touched. They must exceed the largest free piece of the heap, which glibc would take first.
PROBE = 256 << 20


class Widest(TorchFunctionMode):
    """Measures the largest tensor of one task among the results of a model's calls, in ``bytes``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and is_mapped(result):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def group_size(tasks: int, bytes_of_one: int) -> int:
    """Return how many of ``tasks`` to run side by side, when the widest tensor of one has ``bytes_of_one`` bytes."""
    if_mapped, if_kept = (_equal_groups(tasks, limit // max(1, bytes_of_one)) for limit in (WIDEST_MAPPED, WIDEST_KEPT))
    return if_mapped if if_mapped == if_kept or _maps_large_tensors() else if_kept


def _equal_groups(tasks: int, largest: int) -> int:
    groups = -(-tasks // max(1, largest))
    return -(-tasks // groups)


def _maps_large_tensors() -> bool:
    """Tell whether the C library is glibc and gives each large tensor its own mapping."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return False
    libc.mallinfo2.restype = _MallocInfo
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    before = libc.mallinfo2().mappings
    probe = libc.malloc(PROBE)
    mapped = libc.mallinfo2().mappings > before
    libc.free(probe)
    return mapped


class _MallocInfo(ctypes.Structure):
    """Mirrors glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free", "fast", "mappings", "mapped", "peak", "fast_bytes", "used", "freed", "top")
    ]
