"""Cases of ``class_affinity``: pixels attend to class centres through the affinity map; and other ways to do it.

Mode "bwd" is a training step's share: forward, then the gradients of q, k, feats and centers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcss.ops import class_affinity

from . import _affinity, _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up 4096 or 16384 rounded products. bfloat16 rounds
# the class logits, which are about 1, to its 8 bits more than once.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 4e-2}
SOURCES = tuple(
    f"fastcss/{room}/{op}.py" for room in ("_ops", "composed") for op in ("class_affinity", "affinity_attention")
)


def cases(device: str, quick: bool) -> list[Case]:
    """List the points of the specification.

    A CPU takes a minute for the last one and has the forward pass in bfloat16 in its place; it runs the larger map
    forward only.
    """
    points = [(4096, 150), (4096, 21), (16384, 150), (16384, 21)]
    if device == "cuda":
        return [_case(*point, torch.bfloat16, quick) for point in points]
    large = _case(*points[2], torch.float32, quick)
    # torch's own products of bfloat16 take minutes without AVX-512.
    short = quick or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    halves = [_case(*point, torch.bfloat16, quick, "-bf16") for point in points[:2] if short]
    forward = (dataclasses.replace(case, modes=("fwd",)) for case in (large, *halves))
    return [*(_case(*point, torch.float32, quick) for point in points[:2]), *forward]


def _case(pixels: int, classes: int, dtype: torch.dtype, quick: bool, ending: str = "") -> Case:
    shape = {"N": pixels, "K": 64, "D": 512, "C": classes}
    name = f"class_affinity/n{pixels}-k64-d512-c{classes}{ending}"
    if quick:
        name, shape = f"{name}-quick", {"N": pixels // 32, "K": 16, "D": 48, "C": classes}
    build = functools.partial(_problem, shape, dtype, quick)
    return Case("class_affinity", name, shape, dtype, build, SOURCES)


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    pixels, width, classes = shape["N"], shape["D"], shape["C"]
    size = (1, pixels, width)
    tensors = (
        *_affinity.queries_and_keys(shape, dtype, device),
        _steps.normal(*size, dtype=dtype, device=device),
        # The means of features over many pixels are small; with these centres the class logits are about 1.
        _steps.normal(1, classes, width, scale=2 * (pixels / width) ** 0.5, dtype=dtype, device=device),
    )
    gradients = tuple(_steps.normal(*size, dtype=dtype, device=device) for _ in range(2))

    def step(forward: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        return _steps.step_of(forward, tensors, gradients, mode)

    def with_product(product: Callable[..., Tensor]) -> Step:
        return step(functools.partial(_reassociated, product=product))

    def chunked(rows: int) -> Step:
        return with_product(functools.partial(_affinity.ChunkedProduct.apply, rows))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(_with("auto")),
        "chunked": lambda: _steps.fastest(chunked, _affinity.chunk_rows(pixels)),
        "literal": lambda: step(_with("reference")),
        "reassociated": lambda: step(_reassociated),
    }
    if not quick and (pixels <= 8192 or device == "cuda"):
        providers["compiled"] = lambda: step(torch.compile(_reassociated))
    if not quick and pixels <= 8192 and device == "cpu":
        providers["chunked-compiled"] = lambda: with_product(_chunks_compiled())
    if device == "cuda":
        providers["composed"] = lambda: step(_with("composed"))
        providers["triton"] = lambda: step(_with("triton"))
        providers["flex"] = lambda: with_product(_affinity.flex_product)

    def expected():
        return _steps.expected(_with(_affinity.exact(pixels)), tensors, gradients, mode)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs in the order M (F Cᵀ), without what a backward pass recomputes, and bytes in and out of memory."""
    n, k, d, c = (shape[name] for name in ("N", "K", "D", "C"))
    flops, moved = 2 * n * n * (k + c) + 6 * n * d * c, 2 * n * k + 3 * n * d + c * d
    if mode == "bwd":  # inputs and gradients of the outputs are read, gradients of the inputs written
        flops, moved = flops + 2 * n * n * (3 * k + 2 * c) + 12 * n * d * c, 2 * moved + 2 * n * d
    return flops, moved * itemsize


def _with(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return functools.partial(class_affinity, mean=True, impl=impl)


def _reassociated(q: Tensor, k: Tensor, feats: Tensor, centers: Tensor, product=_affinity.whole_product):
    """Compute M V by ``product``, with values of C channels, and inter from column sums without a second product."""
    scores = torch.bmm(feats, centers.mT)
    logits = _affinity.complement(product(q, k, scores), scores)
    return tuple(torch.bmm(x.softmax(dim=2), centers) for x in logits)


def _chunks_compiled(rows: int = 256) -> Callable[..., Tensor]:
    """Compile M V, to be called for each chunk of rows."""
    chunk = torch.compile(_affinity.whole_product)
    return lambda q, k, v: torch.cat([chunk(part, k, v) for part in q.split(rows, dim=1)], dim=1)
