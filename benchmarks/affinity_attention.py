"""Cases of ``affinity_attention``: features of alike and of unlike pixels, and other ways to gather them.

Mode "bwd" is a training step's share: forward, then the gradients of q, k and v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import affinity_attention

from . import _affinity, _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up 4096 rounded products. bfloat16 has 8 bits, and
# the means of 4096 features of either sign are small beside the rounded terms.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/affinity_attention.py", "fastcss/composed/affinity_attention.py")


def cases(device: str, quick: bool) -> list[Case]:
    """The point of the specification."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = {"N": 4096, "K": 64, "D": 512}
    name = "affinity_attention/n4096-k64-d512"
    if quick:
        name, shape = f"{name}-quick", {"N": 128, "K": 16, "D": 48}
    return [Case("affinity_attention", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    size = (1, shape["N"], shape["D"])
    v, *gradients = (_steps.normal(*size, dtype=dtype, device=device) for _ in range(3))
    tensors = (*_affinity.queries_and_keys(shape, dtype, device), v)

    def step(forward: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return _steps.step_of(forward, tensors, gradients, mode)

    def chunked(rows: int) -> Step:
        return step(functools.partial(_chunked, rows=rows))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(_with("auto")),
        "literal": lambda: step(_with("reference")),
        "one-product": lambda: step(_one_product),
        "chunked": lambda: _steps.fastest(chunked, _affinity.chunk_rows(shape["N"])),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_one_product))
    if device == "cuda":
        providers["composed"] = lambda: step(_with("composed"))
        providers["triton"] = lambda: step(_with("triton"))
        providers["flex"] = lambda: step(_flex)

    def expected():
        return _steps.expected(_with(_affinity.exact(shape["N"])), tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, without what a backward pass computes again, and bytes in and out of memory."""
    n, k, d = (shape[name] for name in ("N", "K", "D"))
    flops, moved = 2 * n * n * (k + d), 2 * n * k + 3 * n * d
    if mode == "bwd":  # inputs and gradients of the outputs are read, gradients of the inputs written
        flops, moved = flops + 2 * n * n * (3 * k + 2 * d), 2 * moved + 2 * n * d
    return flops, moved * itemsize


def _with(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(affinity_attention, mean=True, impl=impl)


def _one_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the whole map once, and inter from the column sums, which saves the second product."""
    return _affinity.complement(_affinity.whole_product(q, k, v), v)


def _chunked(q: Tensor, k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return _affinity.complement(_affinity.ChunkedProduct.apply(rows, q, k, v), v)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _affinity.complement(_affinity.flex_product(q, k, v), v)
