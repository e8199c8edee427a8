"""Defines a benchmark case: its inputs, its providers, what they must return and what the work needs at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import measure

#: The provider every ratio is taken against.
OURS = "fastcss"
MODES = ("fwd", "bwd")

#: The engines beside torch. Their memory is not torch's, whose allocator's record does not have it.
ENGINES = ("onnxruntime", "openvino")

Step = Callable[[], Sequence[Tensor]]

# Convolutions of float32 have 11 bits on a GPU by default. This gives them all 24, which torch.mm has and every
# tolerance expects. It is the older of torch's two settings: once the newer one, cudnn.conv.fp32_precision, was set,
# torch.export fails in that process (torch 2.13).
torch.backends.cudnn.allow_tf32 = False


class NotInstalled(ImportError):
    """Says of a provider which of its packages, all of them optional, is not installed."""


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Find the largest difference in any tensor, relative to that tensor's largest expected value.

    It is inf if shapes or NaNs differ, or any whole number does: how far apart two class numbers are says nothing.
    """
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if not b.is_floating_point():
            worst = max(worst, float("inf") if (a != b).any() else 0.0)
        elif b.numel():
            difference = (a.detach().to(b.dtype) - b).abs().max() / b.abs().max().clamp(min=1e-30)
            worst = max(worst, difference.nan_to_num(float("inf")).item())
    return worst


@dataclasses.dataclass
class Problem:
    """Holds a case with its inputs made: the same work for every provider.

    Attributes:
        providers: name → a function that prepares the provider and returns its step. A step does the work once and
            returns its tensors: the output, and in mode "bwd" the gradients after it, in the order of ``expected``.
            Preparing may raise where a provider does not exist on this machine.
        expected: computes what every step must return. It may be a provider's own step, whose first call it then is.
        tolerance: the largest ``error`` that a provider may have.
        flops: what the work needs at least.
        bytes: what must be moved between memory and chip at least.
        error: measures how far a step's tensors are from ``expected``.
        capture: a provider's name and its step → the step as a CUDA graph.
    """

    providers: dict[str, Callable[[], Step]]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: float
    flops: float
    bytes: float
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = largest_error
    capture: Callable[[str, Step], Step] = lambda _, step: measure.captured(step)


@dataclasses.dataclass(frozen=True)
class Case:
    """Names one point of the benchmark.

    ``build(device, mode)`` makes its inputs; ``sources`` are patterns of the source files that it runs.
    """

    op: str
    name: str  # "<op>/<what>"
    shape: dict
    dtype: torch.dtype
    build: Callable[[str, str], Problem]
    sources: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    by_name: bool = False  # it takes so long that it runs only if it was asked for by name
