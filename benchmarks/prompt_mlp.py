"""Cases of ``prompt_mlp``: each row through the perceptron of its own class, and other ways to reach the weights.

Mode "bwd" is a training step's share: forward, then the gradients of z and of every weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import prompt_mlp

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has products of 512 and 1024 rounded terms. bfloat16 has 8
# bits, also for the hidden values where they are in memory.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/prompt_mlp.py", "fastcss/composed/prompt_mlp.py")


def cases(device: str, quick: bool) -> list[Case]:
    """List the points of the specification; every class has a row in training, where weights' gradients are whole."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [_case(150, "fwd", dtype, quick), _case(20, "bwd", dtype, quick)]


def _case(classes: int, mode: str, dtype: torch.dtype, quick: bool) -> Case:
    name, shape = f"prompt_mlp/20of{classes}", {"R": 20, "K": classes, "L": 512, "H": 1024, "O": 1536}
    if quick:
        name, shape = f"{name}-quick", {"R": 4, "K": classes // 5, "L": 64, "H": 48, "O": 80}
    build = functools.partial(_problem, shape, dtype, quick)
    return Case("prompt_mlp", name, shape, dtype, build, SOURCES, modes=(mode,))


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    rows, classes, wide, hidden, out = (shape[n] for n in "RKLHO")

    def normal(*size: int, scale: float = 1.0) -> Tensor:  # in place: 150 classes take 1.2 GiB once, not twice
        return torch.empty(size, dtype=dtype, device=device).normal_(std=scale)

    weights = (
        normal(classes, wide, hidden, scale=wide**-0.5),
        normal(classes, hidden),
        normal(classes, hidden, out, scale=hidden**-0.5),
        normal(classes, out),
    )
    z, gradients = normal(rows, wide), (normal(rows, out),)
    index = torch.randperm(classes, device=device)[:rows]
    _part(z, *weights[:2], index)
    tensors = (z, *weights)

    def step(forward: Callable[..., Tensor]) -> Step:
        return _steps.step_of(lambda *t: (forward(*t, index),), tensors, gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(prompt_mlp),
        "loop": lambda: step(_loop),
        "index_select": lambda: step(_index_select),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_index_select))
    if device == "cuda":
        for impl in ("composed", "triton", "cuda"):
            providers[impl] = lambda impl=impl: step(functools.partial(prompt_mlp, impl=impl))

    def expected():
        def exact(*t, index=index):
            return (prompt_mlp(*t, index, impl="reference"),)

        if mode == "bwd":
            return _steps.expected(exact, tensors, gradients, mode)
        asked = [weight[index] for weight in weights]  # float64 of 150 classes would take 2.4 GiB
        exact = functools.partial(exact, index=torch.arange(rows, device=device))
        return _steps.expected(exact, (z, *asked), gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def _part(z: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> None:
    """Move ``b1`` so that no hidden value is near 0, where rounding would decide whether a ReLU passes its gradient."""
    hidden = torch.bmm(z[:, None].float(), w1[index].float())[:, 0] + b1[index]
    b1[index] += torch.where(hidden < 0, -0.25, 0.25).to(b1.dtype)


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and bytes in and out of memory: weights count for the rows' classes only, which all differ."""
    rows, wide, hidden, out = (shape[n] for n in "RLHO")
    weights = wide * hidden + hidden * out
    flops, moved = 2 * rows * weights, rows * (weights + hidden + out + wide + out)
    return (flops, moved * itemsize) if mode == "fwd" else (3 * flops, 2 * moved * itemsize)


def _loop(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor) -> Tensor:
    """Run one class after the other, as a list of perceptrons does."""
    rows = []
    for row, c in zip(z.split(1), index.tolist(), strict=True):
        hidden = torch.addmm(b1[c], row, w1[c]).relu()
        rows.append(torch.addmm(b2[c], hidden, w2[c]))
    return torch.cat(rows)


def _index_select(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor) -> Tensor:
    """Copy the weights of all rows, then take batched products."""
    hidden = torch.bmm(z[:, None], w1.index_select(0, index)) + b1.index_select(0, index)[:, None]
    return (torch.bmm(hidden.relu(), w2.index_select(0, index)) + b2.index_select(0, index)[:, None])[:, 0]
