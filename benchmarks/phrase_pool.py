"""Cases of ``phrase_pool``: one embedding a class from its phrases, and other ways to weigh them.

Mode "bwd" is a training step's share: forward, then the gradients of cls and phrases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import phrase_pool

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has products of 256 rounded terms. bfloat16 has 8 bits,
# also for the cosines and the weights where they are in memory.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/phrase_pool.py", "fastcss/composed/phrase_pool.py", "fastcss/_cosine.py")


def cases(device: str, quick: bool) -> list[Case]:
    """The point of the specification: 20 classes of VOC with 31 phrases each."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, shape = "phrase_pool/c20-m31", {"B": 1, "C": 20, "M": 31, "D": 256}
    if quick:
        name, shape = f"{name}-quick", {"B": 2, "C": 4, "M": 5, "D": 48}
    return [Case("phrase_pool", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    make = functools.partial(_steps.normal, dtype=dtype, device=device)
    tensors = (make(*(shape[n] for n in "BD")), make(*(shape[n] for n in "CMD")))
    gradients = (make(*(shape[n] for n in "BCD")),)

    def step(forward: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return _steps.step_of(lambda *t: (forward(*t),), tensors, gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(phrase_pool),
        "literal": lambda: step(_literal),
        "bmm": lambda: step(_bmm),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
    if device == "cuda":
        for impl in ("composed", "triton"):
            providers[impl] = lambda impl=impl: step(functools.partial(phrase_pool, impl=impl))

    def expected():
        return _steps.expected(lambda *t: (phrase_pool(*t, impl="reference"),), tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count the FLOPs of the cosines and of the sums, and bytes in and out of memory."""
    b, c, m, d = (shape[n] for n in "BCMD")
    flops, moved = 4 * b * c * m * d, b * d + c * m * d + b * c * d
    return (flops, moved * itemsize) if mode == "fwd" else (3 * flops, 2 * moved * itemsize)


def _literal(cls: Tensor, phrases: Tensor) -> Tensor:
    """Compare every image with every phrase by broadcasting."""
    cosine = F.cosine_similarity(cls[:, None, None], phrases[None], dim=-1)  # [B, C, M]
    return (cosine.softmax(dim=2)[..., None] * phrases[None]).sum(dim=2)


def _bmm(cls: Tensor, phrases: Tensor) -> Tensor:
    """Use two products instead of two broadcasts."""
    cosine = F.normalize(cls, dim=-1) @ F.normalize(phrases, dim=-1).mT  # [C, B, M]
    return torch.bmm(cosine.softmax(dim=2), phrases).transpose(0, 1)
