"""Cases of ``select_tokens``: the tokens that agree with each class, and other ways to collect them.

Mode "bwd" is a training step's share: forward, then the gradients of tokens and classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import select_tokens

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has products of 256 rounded terms, and means of some 450
# cosines. bfloat16 has 8 bits, also for the normalised rows and the cosines where they are in memory.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/select_tokens.py", "fastcss/composed/select_tokens.py", "fastcss/_cosine.py")
THRESHOLD = 0.3


def cases(device: str, quick: bool) -> list[Case]:
    """The point of the specification: a picture of 800 × 1066 pixels and the classes of VOC."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, shape = "select_tokens/n17821-c20", {"N": 17821, "C": 20, "D": 256, "length": 512}
    if quick:
        name, shape = f"{name}-quick", {"N": 300, "C": 5, "D": 64, "length": 160}
    return [Case("select_tokens", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    tensors = tuple(tensor.to(dtype) for tensor in _tokens_and_classes(shape, device))
    classes, length = shape["C"], shape["length"]
    gradients = tuple(_steps.normal(*size, dtype=dtype, device=device) for size in ((1, classes, length), (1, classes)))

    def step(forward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Step:
        return _steps.step_of(functools.partial(forward, threshold=THRESHOLD, length=length), tensors, gradients, mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(select_tokens),
        "literal": lambda: step(_literal),
        "sorted": lambda: step(_sorted),
    }
    if not quick:  # the literal form's lengths depend on the data, which a graph cannot hold
        providers["compiled"] = lambda: step(torch.compile(_sorted))
    if device == "cuda":
        for impl in ("composed", "triton", "cuda"):
            providers[impl] = lambda impl=impl: step(functools.partial(select_tokens, impl=impl))

    def expected():
        exact = functools.partial(select_tokens, threshold=THRESHOLD, length=length, impl="reference")
        return _steps.expected(exact, tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def _tokens_and_classes(shape: dict, device: str) -> tuple[Tensor, Tensor]:
    """Draw half of the tokens above the threshold and half below, none of them near it nor between two classes.

    The tokens of a class share a part of what is orthogonal to the class; otherwise nothing but rounding would be left
    of its gradient in bfloat16.
    """
    n, c, d = (shape[name] for name in "NCD")
    classes, which = torch.randn(c, d, device=device), torch.randint(c, (n,), device=device)
    span = torch.linalg.qr(classes.T).Q  # [D, C]
    own, common = (torch.randn(rows, d, device=device) for rows in (n, c))
    own, common = (F.normalize(x - x @ span @ span.T, dim=1) for x in (own, common))
    rest = F.normalize(own + common[which], dim=1)
    cosine = torch.rand(n, 1, device=device)
    cosine = torch.where(torch.rand(n, 1, device=device) < 0.5, 0.05 + 0.2 * cosine, 0.4 + 0.5 * cosine)
    tokens = (cosine * F.normalize(classes, dim=1)[which] + (1 - cosine**2).sqrt() * rest) * d**0.5
    return tokens[None], classes[None]


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count the FLOPs of the cosines, and bytes moved; the backward pass adds one class per token, as these inputs
    have it."""
    n, c, d, length = (shape[name] for name in ("N", "C", "D", "length"))
    flops, moved = 2 * n * c * d, n * d + c * d + c * length
    return (flops, moved * itemsize) if mode == "fwd" else (flops + 4 * n * d, 2 * moved * itemsize)


def _literal(tokens: Tensor, classes: Tensor, threshold: float, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index by booleans and pad, one class after the other; each class waits for the GPU, if there is one."""
    cosine = F.normalize(tokens, dim=-1) @ F.normalize(classes, dim=-1).mT  # [B, N, C]
    value, best = cosine.max(dim=2)
    selected, counts, presence = [], [], []
    for b in range(len(tokens)):
        for c in range(classes.shape[1]):
            own = tokens[b][(best[b] == c) & (value[b] >= threshold)]
            flat = own.flatten()[:length]
            selected.append(F.pad(flat, (0, length - len(flat))))
            counts.append(len(own))
            reaching = cosine[b, :, c][cosine[b, :, c] >= threshold]
            presence.append(reaching.mean() if len(reaching) else value.new_zeros(()))
    shape = classes.shape[:2]
    counts = torch.tensor(counts, device=tokens.device).view(shape)
    return torch.stack(selected).view(*shape, length), counts, torch.stack(presence).view(shape)


def _sorted(tokens: Tensor, classes: Tensor, threshold: float, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the tokens stably by class and gather the first few of each; the host waits for nothing."""
    count, class_count, places = tokens.shape[1], classes.shape[1], -(-length // tokens.shape[2])
    cosine = F.normalize(tokens, dim=-1) @ F.normalize(classes, dim=-1).mT
    value, best = cosine.max(dim=2)
    best = torch.where(value >= threshold, best, class_count)  # [B, N]; the last class is none
    counts = best.new_zeros(len(best), class_count + 1).scatter_add_(1, best, torch.ones_like(best))
    reaches = cosine >= threshold
    total = torch.where(reaches, cosine, 0).sum(dim=1, dtype=torch.float32)
    presence = (total / reaches.sum(dim=1).clamp(min=1)).to(tokens.dtype)
    order = best.argsort(dim=1, stable=True)
    rank = torch.arange(places, device=tokens.device)
    first = (counts.cumsum(dim=1) - counts)[:, :class_count, None]
    counts = counts[:, :class_count]
    inside = (rank < counts[..., None]).flatten(1)  # [B, C · places]
    source = order.gather(1, (first + rank).clamp(max=count - 1).flatten(1))
    selected = tokens.take_along_dim(source[..., None], dim=1) * inside[..., None]
    return selected.view(len(tokens), class_count, -1)[..., :length], counts, presence
