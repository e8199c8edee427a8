"""What a benchmark case is: its inputs, its providers, what they must return and what the work needs at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import measure

#: The provider every ratio is taken against.
OURS = "fastcss"
MODES = ("fwd", "bwd")

Step = Callable[[], Sequence[Tensor]]

# As torch.mm's, and as every tolerance has it: by default convolutions of float32 have 11 bits on a GPU. This is the
# older of torch's two settings: after the newer, cudnn.conv.fp32_precision, torch.export fails in the process (2.13).
torch.backends.cudnn.allow_tf32 = False


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest expected value.

    inf where shapes or NaNs differ, and where any whole number does: how far apart two class numbers are says nothing.
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
    """A case with its inputs made: the same work for every provider.

    Attributes:
        providers: name → a function that prepares the provider and returns its step. A step does the work once and
            returns its tensors: the output, and in mode "bwd" the gradients after it, in the order of ``expected``.
            Preparing may raise where a provider does not exist on this machine.
        expected: computes what every step must return; a provider whose step it is has that for its first call.
        tolerance: largest error, of what ``error`` measures.
        flops: that the work needs at least.
        bytes: that must be moved between memory and chip at least.
        error: how far a step's tensors are from ``expected``.
        capture: provider's name and its step → the step as a CUDA graph.
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
    """One point of the benchmark.

    ``build(device, mode)`` makes its inputs, ``sources`` are patterns of what runs.
    """

    op: str
    name: str  # "<op>/<what>"
    shape: dict
    dtype: torch.dtype
    build: Callable[[str, str], Problem]
    sources: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    by_name: bool = False  # so long that it runs only where its name was asked for
