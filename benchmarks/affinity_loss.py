"""Cases of ``affinity_loss``: the cross-entropy of all pairs of pixels, and other ways to sum it.

Mode "bwd" is a training step's share: forward, then the gradients of q and k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcss.ops import affinity_loss

from . import _affinity, _steps
from .cases import Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up as many as 16,384² terms. bfloat16 rounds the
# logits to 8 bits where the map is in memory, and the gradients.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
SOURCES = ("fastcss/_ops/affinity_loss.py", "fastcss/composed/affinity_loss.py")
CLASSES = 21


def cases(device: str, quick: bool) -> list[Case]:
    """The points of the specification."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [_case(pixels, dtype, quick) for pixels in (4096, 16384)]


def _case(pixels: int, dtype: torch.dtype, quick: bool) -> Case:
    name, shape = f"affinity_loss/n{pixels}-k64", {"N": pixels, "K": 64}
    if quick:
        name, shape = f"{name}-quick", {"N": pixels // 32, "K": 16}
    return Case("affinity_loss", name, shape, dtype, functools.partial(_problem, shape, dtype, quick), SOURCES)


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    tensors = _affinity.queries_and_keys(shape, dtype, device)
    labels = torch.randint(CLASSES, (1, shape["N"]), device=device)

    def step(forward: Callable[..., Tensor]) -> Step:
        def outputs(q: Tensor, k: Tensor) -> tuple[Tensor]:
            return (forward(q, k, labels),)

        return _steps.step_of(outputs, tensors, [torch.ones((), device=device)], mode)

    def chunked(rows: int) -> Step:
        return step(functools.partial(ChunkedLoss.apply, rows))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: step(_with("auto")),
        "chunked": lambda: _steps.fastest(chunked, _affinity.chunk_rows(shape["N"])),
    }
    # The map, its labels and the losses take 1 GiB each at N = 16,384 in float32, and autograd keeps several of them.
    if shape["N"] <= 8192 or device == "cuda":
        providers["literal"] = lambda: step(_literal)
        if not quick:
            providers["compiled"] = lambda: step(torch.compile(_literal))
    elif mode == "fwd":
        providers["literal"] = lambda: step(_literal)
    if device == "cuda":
        providers["composed"] = lambda: step(_with("composed"))
        providers["triton"] = lambda: step(_with("triton"))

    def expected():
        wide = [tensor.double().requires_grad_() for tensor in tensors]
        with torch.set_grad_enabled(mode == "bwd"):
            loss = _with(_affinity.exact(shape["N"]))(*wide, labels)
        return (loss.detach(), *torch.autograd.grad(loss, wide)) if mode == "bwd" else (loss,)

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode))


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, without what a backward pass computes again, and bytes in and out of memory."""
    n, k = shape["N"], shape["K"]
    flops, moved = 2 * n * n * k, 2 * n * k
    return (flops, moved * itemsize) if mode == "fwd" else (4 * flops, 3 * moved * itemsize)


def _with(impl: str) -> Callable[..., Tensor]:
    return functools.partial(affinity_loss, impl=impl)


def _literal(q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss with both maps, of the logits and of the labels, whole in memory."""
    same = labels[:, :, None] == labels[:, None, :]
    return F.binary_cross_entropy_with_logits(torch.bmm(q, k.mT).float(), same.float())


class ChunkedLoss(torch.autograd.Function):
    """Computes a few rows of the map at a time in one buffer, and the labels' part from sums of q and k by class."""

    @staticmethod
    def forward(ctx, rows: int, q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels[0], CLASSES).to(q.dtype)  # [N, C]
        ctx.save_for_backward(q, k, one_hot)
        ctx.rows = rows
        logits, softplus = q.new_empty(2, rows, k.shape[1])
        total = -((one_hot.t() @ q[0]).float() * (one_hot.t() @ k[0]).float()).sum()
        for part in q[0].split(rows):
            size = len(part)
            torch.mm(part, k[0].t(), out=logits[:size])
            total += torch._C._nn.softplus(logits[:size], out=softplus[:size]).sum(dtype=torch.float32)
        return total / k.shape[1] ** 2

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        q, k, one_hot = ctx.saved_tensors
        q, k, rows, share = q[0], k[0], ctx.rows, dloss / len(k[0]) ** 2
        logits, dq = q.new_empty(rows, len(k)), torch.empty_like(q)
        dk = (one_hot @ (one_hot.t() @ q)).float().neg_()
        for first in range(0, len(q), rows):
            part = slice(first, first + rows)
            slope = torch.mm(q[part], k.t(), out=logits[: len(dq[part])]).sigmoid_()
            torch.mm(slope, k, out=dq[part])
            _affinity.add_product(dk, slope.t(), q[part])
        dq -= one_hot @ (one_hot.t() @ k)
        return None, (dq * share).to(q.dtype)[None], (dk * share).to(k.dtype)[None], None
