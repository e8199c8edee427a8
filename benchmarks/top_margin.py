"""Cases of ``top_margin``: each pixel's true class against its strongest rival, and other ways to find that.

Mode "bwd" is a training step's share: forward, then the gradient of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import top_margin

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up 150 rounded exponentials. bfloat16 has 8 bits, also
# for the whole softmax where it is in memory, and the curvature is a difference of such values.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/top_margin.py", "fastcss/composed/top_margin.py")

Margins = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def cases(device: str, quick: bool) -> list[Case]:
    """The point of the specification: the classes of ADE20K and a picture of 512 × 512."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, shape = "top_margin/c150-512", {"B": 1, "C": 150, "H": 512, "W": 512}
    if quick:
        name, shape = f"{name}-quick", {"B": 2, "C": 12, "H": 24, "W": 20}
    return [Case("top_margin", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    logits, labels = _logits_and_labels(shape, device)
    logits, pixels = logits.to(dtype), [shape[n] for n in "BHW"]
    # The four gradients are those of margin, p_true, p_rival and curvature.
    gradients = tuple(_steps.normal(*pixels, dtype=dtype, device=device) for _ in range(4))

    def step(forward: Callable[[Tensor, Tensor], Margins]) -> Step:
        return _steps.step_of(lambda x: forward(x, labels), (logits,), gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(top_margin),
        "literal": lambda: step(_literal),
        "max": lambda: step(_max),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
        providers["max-compiled"] = lambda: step(torch.compile(_max))
    if device == "cuda":
        for impl in ("composed", "triton"):
            providers[impl] = lambda impl=impl: step(functools.partial(top_margin, impl=impl))

    def expected():
        exact = "reference" if quick else "composed"  # some pixels at a time: sorted, float64 takes gigabytes
        return _steps.expected(lambda x: top_margin(x, labels, impl=exact), (logits,), gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def _logits_and_labels(shape: dict, device: str) -> tuple[Tensor, Tensor]:
    """Draw noise below 3, and two larger logits per pixel that bfloat16 can tell apart; the label is one of these two
    classes or any class."""
    b, c, h, w = (shape[n] for n in "BCHW")
    logits = torch.randn(b, c, h, w, device=device).clamp_(max=3)
    first = torch.randint(c, (b, 1, h, w), device=device)
    second = (first + torch.randint(1, c, first.shape, device=device)) % c
    value = 3.5 + 2 * torch.rand(first.shape, device=device)
    logits.scatter_(1, second, value).scatter_(1, first, value + 0.25 + 2 * torch.rand(first.shape, device=device))
    which = torch.rand(first.shape, device=device)
    labels = torch.where(which < 0.7, first, torch.where(which < 0.85, second, torch.randint_like(first, c)))
    return logits, labels[:, 0]


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count no FLOPs, as there are no products; and bytes of the logits, the labels, the five outputs, and the
    gradients of all but the rival."""
    b, c, h, w = (shape[n] for n in "BCHW")
    moved = b * h * w * ((c + 4) * itemsize + 2 * 8)
    return (0.0, moved) if mode == "fwd" else (0.0, moved + b * h * w * (2 * c + 4) * itemsize)


def _literal(logits: Tensor, labels: Tensor) -> Margins:
    """Take the two largest logits of a pixel, one of which is the rival, and the whole softmax."""
    true = labels[:, None]
    top = logits.topk(2, dim=1).indices
    rival = torch.where(top[:, :1] == true, top[:, 1:], top[:, :1])
    margin = logits.gather(1, true) - logits.gather(1, rival)
    p = logits.softmax(dim=1)
    return _margins(margin, rival, p.gather(1, true), p.gather(1, rival))


def _max(logits: Tensor, labels: Tensor) -> Margins:
    """Take the largest of the logits without the true one, and the softmax at two classes only."""
    true = labels[:, None]
    rival = logits.detach().scatter(1, true, float("-inf")).argmax(dim=1, keepdim=True)
    z_true, z_rival = logits.gather(1, true), logits.gather(1, rival)
    lse = logits.logsumexp(dim=1, keepdim=True)
    return _margins(z_true - z_rival, rival, (z_true - lse).exp(), (z_rival - lse).exp())


def _margins(margin: Tensor, rival: Tensor, p_true: Tensor, p_rival: Tensor) -> Margins:
    curvature = (p_true + p_rival) - (p_true - p_rival).square()
    return tuple(x[:, 0] for x in (margin, rival, p_true, p_rival, curvature))
