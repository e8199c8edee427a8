"""Cases of ``multi_lora``: T adapters over one linear layer, and the other ways to run them with torch and PEFT.

Mode "bwd" is a training step's share in this layer: forward, then the gradients of x and of every adapter, base frozen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import fastcss

from . import _onednn, _peft
from ._lora_layer import Layer
from .cases import MODES, Case, Problem, Step

# Errors are relative to the largest expected value. float32 adds up as many as 4096 rounded products. bfloat16 has 8
# bits, and merged weights are rounded once more than the layer itself.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SOURCES = ("fastcss/_ops/multi_lora.py", "fastcss/composed/multi_lora.py", "fastcss/packed_lora.py")


def cases(device: str, quick: bool) -> list[Case]:
    """The points of the specification."""
    if device == "cuda":
        shared = [("shared", m, n, n, 6, 32) for m in (4096, 17821) for n in (256, 1024)]
        diverged = [("diverged", 4096, n, n, 6, 32) for n in (256, 1024)]
        few_rows = [(form, m, n, n, 6, 32) for form in FORMS for m in (1, 16, 64) for n in (1024, 4096)]
        return [_case("", *point, torch.bfloat16, quick) for point in shared + diverged + few_rows]
    main = [_case("", form, 1024, 768, 768, 6, 32, torch.float32, quick) for form in FORMS]
    rows, tasks, ranks = ((1, 64), (2,), (8,)) if quick else ((1, 64, 1024, 4096), (2, 6, 11), (8, 32))
    grid = itertools.product(FORMS, rows, tasks, ranks)
    return main + [_case("grid-", form, m, 768, 768, t, r, torch.float32, quick) for form, m, t, r in grid]


FORMS = ("shared", "diverged")


def _case(prefix: str, form: str, m: int, k: int, n: int, t: int, r: int, dtype: torch.dtype, quick: bool) -> Case:
    where = f"m{m}-t{t}-r{r}" if prefix else f"m{m}-k{k}-n{n}-t{t}-r{r}"
    name = f"multi_lora/{prefix}{form}-{where}"
    if quick:
        name, m, k, n = f"{name}-quick", min(m, 64), 96, 80
    shape = {"form": form, "M": m, "K": k, "N": n, "T": t, "r": r}
    grid = bool(prefix)
    build = functools.partial(_problem, shape, dtype, not (grid or quick))
    # These two dozen points would take minutes with backward; the points beside the grid have it at 1024 rows.
    modes = ("fwd",) if grid and m >= 1024 else MODES
    return Case("multi_lora", name, shape, dtype, build, SOURCES, modes)


def _problem(shape: dict, dtype: torch.dtype, compiled: bool, device: str, mode: str) -> Problem:
    data = Layer.random(shape, dtype, device)
    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: _ours(data, mode, "auto"),
        "peft-loop": lambda: _peft.loop(data, mode),
        "baddbmm": lambda: _stepped(_padded, data, mode),
        "merged": lambda: _merged(data, mode),
        "torch-best": lambda: _torch_best(data, mode),
    }
    if device == "cpu" and mode == "fwd" and _onednn.is_there():
        providers["onednn-packed"] = lambda: _onednn_packed(data)
    if compiled:
        providers["compiled"] = lambda: _stepped(torch.compile(_stacked), data, mode)
    if mode == "fwd" and not data.shared:
        providers["peft-mixed"] = lambda: _peft.mixed(_peft.layer(data.weight, data.bias, data.a, data.b), data.x)
    if device == "cuda":
        providers["composed"] = lambda: _ours(data, mode, "composed")
        providers["triton"] = lambda: _ours(data, mode, "triton")
        if mode == "fwd" and hasattr(torch, "_grouped_mm"):
            providers["grouped-mm"] = lambda: _grouped(data)
    flops, moved = work(shape, dtype.itemsize, mode)
    return Problem(providers, lambda: _expected(data, mode), TOLERANCE[dtype], flops, moved)


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count the FLOPs, and the bytes in and out of memory, that a perfect implementation needs."""
    m, k, n, t, ranks = shape["M"], shape["K"], shape["N"], shape["T"], shape["T"] * shape["r"]
    inputs = 1 if shape["form"] == "shared" else t
    base, delta = 2 * inputs * m * k * n, 2 * m * ranks * (k + n)
    x, y, weights, adapters = inputs * m * k, t * m * n, n * k + n, ranks * (k + n)
    if mode == "fwd":
        return base + delta, (x + weights + adapters + y) * itemsize
    # The gradient of x repeats both products; each adapter's gradient adds its own two.
    return 2 * base + 3 * delta, (2 * x + weights + 2 * adapters + 2 * y) * itemsize


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _stepped(forward: Forward, data: Layer, mode: str) -> Step:
    """Make a step of ``forward(x, weight, bias, a, b)`` → [T, M, N]."""
    x, weight, bias, a, b = data.x, data.weight, data.bias, data.a, data.b
    if mode == "fwd":

        def step():
            with torch.no_grad():
                return (forward(x, weight, bias, a, b),)

        return step
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]

    def step():
        y = forward(leaves[0], weight, bias, *leaves[1:])
        return (y.detach(), *torch.autograd.grad(y, leaves, data.dy))

    return step


def _expected(data: Layer, mode: str) -> Sequence[Tensor]:
    wide = Layer(*(getattr(data, field.name).double() for field in dataclasses.fields(data)))
    return _stepped(_with_ours(wide, "reference"), wide, mode)()


def _with_ours(data: Layer, impl: str) -> Forward:
    t, r = data.a.shape[:2]
    offsets = torch.arange(0, (t + 1) * r, r, dtype=torch.int32, device=data.x.device)
    scales = torch.ones(t, device=data.x.device)
    form = "shared" if data.shared else "diverged"

    def forward(x, weight, bias, a, b):
        lora = fastcss.PackedLora(a.flatten(0, 1), b.flatten(0, 1), (r,) * t, offsets, scales)
        return fastcss.multi_lora(x, weight, lora, bias, mode=form, impl=impl)

    return forward


def _ours(data: Layer, mode: str, impl: str) -> Step:
    return _stepped(_with_ours(data, impl), data, mode)


def _padded(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the shrink as one product per task, and the expand as ``baddbmm`` onto the base."""
    hidden = torch.matmul(x, a.transpose(1, 2))  # [T, M, r]
    return torch.baddbmm(F.linear(x, weight, bias).expand(a.shape[0], -1, -1), hidden, b)


def _stacked(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Do as ``_padded`` does, with the shrink of a shared input as one GEMM over all tasks' rows."""
    base = F.linear(x, weight, bias)
    if x.dim() == 2:
        hidden = (x @ a.flatten(0, 1).t()).unflatten(1, a.shape[:2]).transpose(0, 1)  # [T, M, r]
        return torch.baddbmm(base.expand(a.shape[0], -1, -1), hidden, b)
    return torch.baddbmm(base, torch.bmm(x, a.transpose(1, 2)), b)


def _torch_best(data: Layer, mode: str) -> Step:
    """Take the best composition of torch ops we know; without autograd it writes into buffers made beforehand."""
    if mode == "bwd":
        return _stepped(_stacked, data, mode)
    (t, r, k), n = data.a.shape, data.weight.shape[0]
    y = data.dy.new_empty(data.dy.shape)
    x, shrink, expand = data.x, data.a.flatten(0, 1).t(), data.b
    if data.shared:
        hidden = x.new_empty(x.shape[0], t * r)
        base = x.new_empty(x.shape[0], n)

        def step():
            torch.addmm(data.bias, x, data.weight.t(), out=base)
            torch.mm(x, shrink, out=hidden)
            return (torch.baddbmm(base.expand(t, -1, -1), hidden.unflatten(1, (t, r)).transpose(0, 1), expand, out=y),)

        return _without_grad(step)
    hidden = x.new_empty(t, x.shape[1], r)

    def step():
        torch.addmm(data.bias, x.view(-1, k), data.weight.t(), out=y.view(-1, n))
        torch.bmm(x, data.a.transpose(1, 2), out=hidden)
        return (y.baddbmm_(hidden, expand),)

    return _without_grad(step)


def _onednn_packed(data: Layer) -> Step:
    """Do as ``_torch_best`` does, with oneDNN's products by the base and the shrinks, with weights packed before."""
    (t, r, k), m = data.a.shape, data.dy.shape[1]
    if data.shared:
        base, shrink = (
            _onednn.packed_linear(data.weight, data.bias, m),
            _onednn.packed_linear(data.a.flatten(0, 1), None, m),
        )
        y = torch.empty_like(data.dy)

        def step():
            hidden = shrink(data.x).unflatten(1, (t, r)).transpose(0, 1)  # [T, M, r]
            return (torch.baddbmm(base(data.x).expand(t, -1, -1), hidden, data.b, out=y),)

        return _without_grad(step)
    base, shrinks = (
        _onednn.packed_linear(data.weight, data.bias, t * m),
        [_onednn.packed_linear(a, None, m) for a in data.a],
    )

    def step():
        hidden = torch.stack([shrink(x) for shrink, x in zip(shrinks, data.x, strict=True)])
        return (base(data.x.view(-1, k)).view(data.dy.shape).baddbmm_(hidden, data.b),)

    return _without_grad(step)


def _merged(data: Layer, mode: str) -> Step:
    """Merge T whole weights ``W + B_t A_t``: once for inference, and in every step of training, as adapters change."""

    def merge(a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(data.weight.t().expand(a.shape[0], -1, -1), a.transpose(1, 2), b)  # [T, K, N]

    def forward(x, weight, bias, a, b):
        return torch.baddbmm(bias.expand(a.shape[0], 1, -1), x.expand(a.shape[0], -1, -1), merge(a, b))

    if mode == "bwd":
        return _stepped(forward, data, mode)
    # The weights are merged in float32 and rounded once.
    wide = torch.baddbmm(
        data.weight.t().float().expand(data.tasks, -1, -1), data.a.transpose(1, 2).float(), data.b.float()
    )
    weights = wide.to(data.x.dtype)
    bias = data.bias.expand(data.tasks, 1, -1)
    return _without_grad(lambda: (torch.baddbmm(bias, data.x.expand(data.tasks, -1, -1), weights),))


def _grouped(data: Layer) -> Step:
    """Expand by ``torch._grouped_mm``, and add the base after it."""
    t, m = data.tasks, data.dy.shape[1]
    ends = torch.arange(m, (t + 1) * m, m, dtype=torch.int32, device=data.x.device)

    def step():
        hidden = torch.matmul(data.x, data.a.transpose(1, 2)).flatten(0, 1)  # [T·M, r]
        delta = torch._grouped_mm(hidden, data.b, offs=ends).unflatten(0, (t, m))
        return (delta.add_(F.linear(data.x, data.weight, data.bias)),)

    return _without_grad(step)


def _without_grad(step: Step) -> Step:
    return torch.no_grad()(step)
