"""Cases of ``topk_queries``: the tokens nearest to any class's prototype, and other ways to find them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import topk_queries

from . import _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 has products of 256 rounded terms; bfloat16 has 8 bits in
# the scores.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
SOURCES = ("fastcss/_ops/topk_queries.py", "fastcss/composed/topk_queries.py")
#: The chunked form tries this many tokens at a time.
CHUNKS = (256, 1024, 4096)


def cases(device: str, quick: bool) -> list[Case]:
    """The point of the specification: the tokens of a 640 × 640 picture in three scales and the classes of ADE20K."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, shape = "topk_queries/n8400-c150", {"B": 1, "N": 8400, "C": 150, "D": 256, "k": 100}
    if quick:
        name, shape = f"{name}-quick", {"B": 2, "N": 300, "C": 10, "D": 64, "k": 8}
    build = functools.partial(_problem, shape, dtype, quick)
    return [Case("topk_queries", name, shape, dtype, build, SOURCES, modes=("fwd",))]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    prototypes = _steps.normal(shape["C"], shape["D"], scale=shape["D"] ** -0.5, dtype=dtype, device=device)
    bias = _steps.normal(shape["C"], scale=0.1, dtype=dtype, device=device)
    features = _features(shape, prototypes.float(), bias.float()).to(dtype)
    k = shape["k"]

    def step(forward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Step:
        return torch.no_grad()(lambda: forward(features, prototypes, k, bias))

    def chunked(tokens: int) -> Step:
        return step(functools.partial(_chunked, tokens=tokens))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(topk_queries),
        "literal": lambda: step(_literal),
        "chunked": lambda: _steps.fastest(chunked, CHUNKS),
    }
    if not quick:
        providers["compiled"] = lambda: step(torch.compile(_literal))
    if device == "cuda":
        for impl in ("composed", "triton"):
            providers[impl] = lambda impl=impl: step(functools.partial(topk_queries, impl=impl))

    def expected():
        wide = (tensor.double() for tensor in (features, prototypes, bias))
        features64, prototypes64, bias64 = wide
        return topk_queries(features64, prototypes64, k, bias64, impl="reference")

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize))


def _features(shape: dict, prototypes: Tensor, bias: Tensor) -> Tensor:
    """Draw noise, and k tokens of each picture with logits above the noise, 1.5% apart: far enough for bfloat16."""
    features = torch.randn(*(shape[n] for n in "BND"), device=prototypes.device)
    logit = 7 * 1.015 ** torch.arange(shape["k"], device=prototypes.device)
    for tokens in features:
        places = torch.randperm(shape["N"], device=prototypes.device)[: shape["k"]]
        classes = torch.randint(shape["C"], (shape["k"],), device=prototypes.device)
        row = prototypes[classes]
        missing = logit - bias[classes] - (tokens[places] * row).sum(1)
        tokens[places] += (missing / row.square().sum(1))[:, None] * row
    return features


def work(shape: dict, itemsize: int) -> tuple[float, float]:
    """Count FLOPs, and bytes in and out of memory."""
    b, n, c, d, k = (shape[name] for name in "BNCDk")
    return 2 * b * n * c * d, (b * n * d + c * d + c + b * k * d + b * k) * itemsize + b * k * 8


def _literal(features: Tensor, prototypes: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run Mask2Former's class layer over all tokens, as SimCIS does to select its queries."""
    logits = F.linear(features, prototypes, bias)
    score, index = torch.topk(logits.max(-1)[0], k, dim=1)
    return torch.gather(features, 1, index[..., None].repeat(1, 1, features.shape[-1])), index, score


def _chunked(features: Tensor, prototypes: Tensor, k: int, bias: Tensor, tokens: int):
    """Compute the logits of some tokens at a time, and no index of the best class."""
    parts = [F.linear(part, prototypes, bias).amax(dim=2) for part in features.split(tokens, dim=1)]
    score, index = torch.cat(parts, dim=1).topk(k, dim=1)
    return features.take_along_dim(index[..., None], dim=1), index, score
