"""Cases of ``class_centers``: mean features of each class under a softmax over the pixels.

Mode "bwd" is a training step's share: forward, then the gradients of logits and feats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import class_centers

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up 4096 rounded products. bfloat16 has 8 bits, also
# for the softmaxed map where it is in memory.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SOURCES = ("fastcss/_ops/class_centers.py", "fastcss/composed/class_centers.py")


def cases(device: str, quick: bool) -> list[Case]:
    """The points of the specification."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [_case(classes, dtype, quick) for classes in (150, 21)]


def _case(classes: int, dtype: torch.dtype, quick: bool) -> Case:
    name, shape = f"class_centers/n4096-d512-c{classes}", {"N": 4096, "D": 512, "C": classes}
    if quick:
        name, shape = f"{name}-quick", {"N": 128, "D": 48, "C": classes}
    return Case("class_centers", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    n, d, c = (shape[name] for name in ("N", "D", "C"))
    # Both lie in memory as a backbone gives them: [B, channels, pixels].
    tensors = (
        _steps.normal(1, c, n, scale=2, dtype=dtype, device=device),
        _steps.normal(1, d, n, dtype=dtype, device=device).mT,
    )
    gradients = (_steps.normal(1, c, d, dtype=dtype, device=device),)

    def step(forward: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return _steps.step_of(lambda *t: (forward(*t),), tensors, gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(_with("auto")),
        "literal": lambda: step(_with("reference")),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
    if device == "cuda":
        providers["composed"] = lambda: step(_with("composed"))
        providers["triton"] = lambda: step(_with("triton"))

    def expected():
        return _steps.expected(lambda *t: (_literal(*t),), tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and bytes in and out of memory."""
    n, d, c = (shape[name] for name in ("N", "D", "C"))
    flops, moved = 2 * n * d * c, c * n + n * d + c * d
    return (flops, moved * itemsize) if mode == "fwd" else (3 * flops, 2 * moved * itemsize)


def _with(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    return functools.partial(class_centers, impl=impl)


def _literal(logits: Tensor, feats: Tensor) -> Tensor:
    return torch.bmm(logits.softmax(dim=2), feats)
