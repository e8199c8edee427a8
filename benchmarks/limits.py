"""Measures what this machine can do at best: the rate of a GEMM and of a copy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

import fastcss
from fastcss._dispatch import backends

from .measure import times_ms

#: Bytes, more than any cache holds.
COPIED = {"cuda": 1 << 30, "cpu": 256 << 20}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Holds ``gemm`` in FLOP/s and ``copy`` in bytes/s, which counts both read and written bytes."""

    gemm: float
    copy: float

    def ms(self, flops: float, bytes: float) -> float:
        """Compute the least time for this much work, as if both units were busy all the time."""
        return max(flops / self.gemm, bytes / self.copy) * 1e3


@functools.cache
def measured_limits(device: str, dtype: torch.dtype) -> Limits:
    """Measure the best of some GEMM sizes and of some copies, once per run."""
    sizes = (4096, 8192) if device == "cuda" else (768, 2048)
    gemm = max(2 * n**3 / _best_seconds(step, device) for n in sizes for step in _gemms(n, device, dtype))
    source = torch.zeros(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * COPIED[device] / _best_seconds(lambda: target.copy_(source), device)
    return Limits(gemm, copy)


def _gemms(n: int, device: str, dtype: torch.dtype) -> list[Callable[[], object]]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    steps = [lambda: torch.mm(a, b.t(), out=out)]
    if device == "cpu" and backends.why_not("cpu", a) is None:
        # One adapter of rank 0 is the bare layer: the project's own micro-kernel and nothing else.
        bare = fastcss.PackedLora.pack([a.new_empty(0, n)], [a.new_empty(n, 0)], [1.0])
        steps.append(lambda: fastcss.multi_lora(a, b, bare, impl="cpu"))
    return steps


def _best_seconds(step: Callable[[], object], device: str) -> float:
    return min(times_ms({"limit": step}, device, seconds=0.15)["limit"]) / 1e3
