"""Cases of ``multi_lora`` with a thousand adapters: a batch of 64 samples, each routed to an adapter of its own.

"one-adapter" is the anchor: the same rows, all through one adapter. What is above it is the price of reading 64
adapters in place of one; at one row a sample they are 6 MB beside the layer's 2.4 MB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcss

from . import _peft
from .cases import Case, Problem, Step, largest_error
from .multi_lora import SOURCES, TOLERANCE

SAMPLES, ADAPTERS, RANK, WIDTH = 64, 1000, 16, 768


def cases(device: str, quick: bool) -> list[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = []
    for rows in (1, 4, 16, 197):  # 197: the tokens of a ViT at 224 × 224
        name = f"multi_lora/routed-t1000-m{rows}" + "-quick" * quick
        shape = {"form": "routed", "S": SAMPLES, "M": rows, "K": WIDTH, "N": WIDTH, "T": ADAPTERS, "r": RANK}
        if quick:
            shape |= {"S": 6, "K": 96, "N": 80, "T": 9}
        build = functools.partial(_problem, shape, dtype)
        by_name = rows not in (1, 16) and not quick
        found.append(Case("multi_lora", name, shape, dtype, build, SOURCES, modes=("fwd",), by_name=by_name))
    return found[:1] if quick else found


def _problem(shape: dict, dtype: torch.dtype, device: str, mode: str) -> Problem:
    s, m, k, n, t, r = (shape[name] for name in ("S", "M", "K", "N", "T", "r"))

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    x, weight, bias = normal(s, m, k), normal(n, k, scale=k**-0.5), normal(n)
    a, b = normal(t, r, k, scale=k**-0.5), normal(t, r, n)  # B is scaled already
    index = torch.randperm(t, device=device)[:s]
    offsets = torch.arange(0, (t + 1) * r, r, dtype=torch.int32, device=device)
    lora = fastcss.PackedLora(a.flatten(0, 1), b.flatten(0, 1), (r,) * t, offsets, torch.ones(t, device=device))
    one = fastcss.PackedLora(a[0], b[0], (r,), offsets[:2], lora.scales[:1])
    mark = torch.zeros(1, device=device)

    def gathered() -> Sequence[Tensor]:
        return (torch.baddbmm(F.linear(x, weight, bias), torch.bmm(x, a[index].transpose(1, 2)), b[index]),)

    def one_adapter() -> Sequence[Tensor]:
        return fastcss.multi_lora(x.flatten(0, 1), weight, one, bias)[0].view(s, m, n), mark

    def expected() -> Sequence[Tensor]:
        pairs = [(a[index], b[index]), (a[:1].expand(s, -1, -1), b[:1].expand(s, -1, -1))]
        base = F.linear(x.double(), weight.double(), bias.double())
        return tuple(base + x.double() @ down.double().transpose(1, 2) @ up.double() for down, up in pairs)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: torch.no_grad()(
            lambda: (fastcss.multi_lora(x, weight, lora, bias, mode="routed", index=index),)
        ),
        "one-adapter": lambda: torch.no_grad()(one_adapter),
        "gathered-bmm": lambda: torch.no_grad()(gathered),
        # Its layer holds the adapters of the batch alone; the others would cost it nothing.
        "peft-mixed": lambda: _peft.mixed(_peft.layer(weight, bias, a[index], b[index]), x),
    }
    flops = 2 * s * m * (k * n + r * (k + n))
    moved = (s * m * (k + n) + k * n + n + s * r * (k + n)) * dtype.itemsize
    return Problem(providers, expected, TOLERANCE[dtype], flops, moved, error=_error)


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compare with what the routed adapters give, or with what the one gives if the step has the anchor's mark."""
    return largest_error(got[:1], expected[len(got) - 1 : len(got)])
