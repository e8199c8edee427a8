"""Gives cases what several ops need: random inputs, steps with and without gradients, the best size of a chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import torch
from torch import Tensor

from fastcss._dispatch import backends
from fastcss._one_pass.shared_work import SharedWork

from . import measure
from .cases import Step

Forward = Callable[..., Sequence[Tensor]]


def normal(*size: int, scale: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(*size, device=device) * scale).to(dtype)


def step_of(forward: Forward, tensors: Sequence[Tensor], gradients: Sequence[Tensor], mode: str) -> Step:
    """Make a step of ``forward(*tensors)``; in mode "bwd" with the gradients of all tensors.

    Args:
        forward: tensors → outputs.
        tensors: the inputs, all differentiable.
        gradients: one for each differentiable output, in the order of the outputs.
        mode: "fwd" or "bwd".
    """
    if mode == "fwd":

        def step():
            with torch.no_grad():
                return forward(*tensors)

        return step
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]

    def step():
        outputs = forward(*leaves)
        differentiable = [y for y in outputs if y.requires_grad]
        return *(y.detach() for y in outputs), *torch.autograd.grad(differentiable, leaves, gradients)

    return step


def expected(forward: Forward, tensors: Sequence[Tensor], gradients: Sequence[Tensor], mode: str) -> Sequence[Tensor]:
    """Compute the outputs of ``forward`` in float64, and in mode "bwd" the gradients."""
    return step_of(forward, [t.double() for t in tensors], [dy.double() for dy in gradients], mode)()


def on(impl: str, step: Step) -> Step:
    """Run ``step`` on ``impl`` where impl="auto" has no choice on a GPU yet, because no measurement supports one."""
    choice = dict.fromkeys(backends.KERNELS[impl], (impl,))

    def run():
        with mock.patch.dict(backends.MEASURED_ON_GPU, choice):
            return step()

    return run


def capture_with(shared: Iterable[Tensor]) -> Callable[[str, Step], Step]:
    """Make a ``Problem.capture`` for whole models: the graph leaves out what depends only on shapes and these tensors.

    ``runner.capture`` leaves out what depends on its fixed inputs in the same way. The provider "compiled" is captured
    whole, since torch.compile does not compile while calls are watched.
    """
    shared = list(shared)
    return lambda name, step: measure.captured(step, SharedWork(shared) if name != "compiled" else None)


def fastest(prepare: Callable[[int], Step], sizes: Sequence[int]) -> Step:
    """Return the step with the chunk size that is fastest here, judged by the better of two calls.

    A single call may meet a slow moment, and a choice that changes from run to run is noise that no row shows.
    """

    def seconds(step: Step) -> float:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def better_of_two(step: Step) -> float:
        return min(seconds(step) for _ in range(2))

    return min((prepare(size) for size in sizes), key=better_of_two)
