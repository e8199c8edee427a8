"""Batched multi-LoRA linear layer: one base GEMM, every adapter, one write of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, loop_vmap, once_differentiable
from .._dispatch.readable_values import readable
from ..composed import multi_lora as composed
from ..packed_lora import PackedLora
from ..reference import multi_lora as reference
from ._arguments import autocasts, check_device, check_floating, check_tensor

MODES = ("shared", "diverged", "routed")


def multi_lora(
    x: Tensor,
    weight: Tensor,
    lora: PackedLora,
    bias: Tensor | None = None,
    *,
    mode: str = "shared",
    index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Run a linear layer with many LoRA adapters at once: ``y_t = x_t Wᵀ + bias + scale_t (x_t A_tᵀ) B_tᵀ``.

    Args:
        x: float32, bfloat16 or float16 (float64 runs composed). ``[*, K]`` in mode "shared": the same input through all
            T adapters. ``[T, *, K]`` in mode "diverged": input t through adapter t. ``[S, *, K]`` in mode "routed":
            sample s through adapter ``index[s]``.
        weight: ``[N, K]``, dtype of ``x``.
        lora: the T packed adapters, in the dtype of ``x`` or in float32.
        bias: ``[N]``, dtype of ``x``.
        mode: "shared", "diverged" or "routed".
        index: int32 or int64 ``[S]`` on the device of ``x``, in mode "routed" only; -1 means the bare layer.
            On CPU an index out of range raises; on CUDA, where reading it would stall, it gives rows of NaN.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``[T, *, N]`` (shared, diverged) or ``[S, *, N]`` (routed). Differentiable once in ``x``, ``weight``, ``bias``,
        ``lora.a`` and ``lora.b``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        IndexError: an entry of ``index`` is no adapter (CPU).
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: LoRA (Hu et al. 2021) eq. 3; batching after S-LoRA and Punica; the task loop of DecoupleCSS §3.4.

    Example:
        >>> lora = PackedLora.pack([torch.randn(4, 8)] * 6, [torch.randn(16, 4)] * 6, [1.0] * 6)
        >>> multi_lora(torch.randn(100, 8), torch.randn(16, 8), lora).shape
        torch.Size([6, 100, 16])
    """
    casts = _check(x, weight, lora, bias, mode, index)
    if casts:
        x, weight, bias, lora = _autocast(x, weight, bias, lora)
    impl = backends.choose("multi_lora", impl, x)
    inner = x.shape[:-1] if mode == "shared" else x.shape[1:-1]
    rows = x
    if len(inner) != 1:  # the raw op takes [M, K] or [slots, M, K]
        rows = x.flatten(-1 - len(inner), -2) if inner else x.unsqueeze(-2)
    if impl in ("reference", "composed"):
        room = reference if impl == "reference" else composed
        y = room.multi_lora(rows, weight, bias, lora, index)
    else:
        if lora.has_spans and impl != "cpu":
            lora, index = _gathered(lora, index)
        pack = (lora.a, lora.b, lora.offsets, lora.scales)
        y = FORWARD[impl](rows, weight, bias, *pack, index, lora.max_rank, False)[0]
    return y if len(inner) == 1 else y.reshape(y.shape[0], *inner, y.shape[-1])


def _gathered(lora: PackedLora, index: Tensor | None) -> tuple[PackedLora, Tensor]:
    """Copy the slots' adapters out of the spans, which the C++ kernel alone reads; → their pack, and its index."""
    if index is None:
        index = torch.arange(lora.num_adapters, device=lora.a.device)
    slots, rank = index.shape[0], lora.max_rank
    known = (index >= 0) & (index < lora.num_adapters)
    a, b = (padded.flatten(0, 1) for padded in lora.padded(torch.where(known, index, -1)))
    offsets = torch.arange(slots + 1, dtype=torch.int32, device=a.device) * rank
    place = torch.arange(slots, dtype=index.dtype, device=a.device)
    # A wrong index stays one: the kernel makes rows of NaN of it.
    index, scales = (
        torch.where(known, place, torch.where(index < 0, index, slots)),
        lora.scales[index.clamp(0, lora.num_adapters - 1)],
    )
    return PackedLora(a, b, (rank,) * slots, offsets, scales), index


class MultiLora(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, offsets, scales, index, max_rank, save_h, impl):
        save_h = save_h or ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        y, h = FORWARD.beneath[impl](x, weight, bias, a, b, offsets, scales, index, max_rank, save_h)
        ctx.max_rank, ctx.impl = max_rank, impl
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(x, weight, a, b, offsets, scales, index, h)
        return y, h

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, a, b, offsets, scales, index, h = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = da = db = dweight = dbias = None
        if need_x or need_a or need_b:
            route = (offsets, scales, index, h, ctx.max_rank)
            dx, da, db = BACKWARD[ctx.impl](dy, x, weight, a, b, *route, need_x, need_a or need_b)
        if need_weight:
            dweight = dy.sum(0).t() @ x if x.dim() == 2 else dy.flatten(0, 1).t() @ x.flatten(0, 1)
        if need_bias:
            dbias = dy.sum((0, 1))
        grads = zip((dx, dweight, dbias, da, db), ctx.needs_input_grad, strict=False)
        return *(grad if need else None for grad, need in grads), *[None] * 6


def _vmap(op: Callable, batch: int, in_dims: tuple, arguments: tuple) -> tuple:
    """Fold a mapped axis into the slots of one call of ``op``.

    Mapped over the input or the index, each sample brings its own slots; mapped over the adapters, the samples' packs
    become one pack. Anything else (a mapped base weight) runs one call a sample.
    """
    mapped = [dim is not None for dim in in_dims]
    moved = [v.movedim(dim, 0) if dim is not None else v for v, dim in zip(arguments, in_dims, strict=True)]
    x, weight, bias, a, b, offsets, scales, index, *rest = moved
    x_mapped, base_mapped, pack_mapped = mapped[0], any(mapped[1:3]), mapped[3] or mapped[4] or mapped[6]
    if base_mapped or mapped[5] or (pack_mapped and (index is not None or offsets.dim() == 2)):
        calls = [op(*(v[i] if m else v for v, m in zip(moved, mapped, strict=True)))[0] for i in range(batch)]
        return (torch.stack(calls), x.new_empty(0, dtype=torch.float32)), (0, None)

    slots = scales.shape[-1] if index is None else index.shape[-1]
    if pack_mapped:
        a, b, scales = (v if mapped[i] else v.expand(batch, *v.shape) for i, v in ((3, a), (4, b), (6, scales)))
        first = torch.arange(batch, dtype=offsets.dtype, device=offsets.device)[:, None] * a.shape[1]
        offsets = torch.cat([(first + offsets[:-1]).flatten(), offsets.new_full((1,), batch * a.shape[1])])
        a, b, scales = a.flatten(0, 1), b.flatten(0, 1), scales.flatten()
    else:
        if index is None:
            index = torch.arange(slots, device=x.device)
        index = index.expand(batch, slots).reshape(-1)

    per_slot = x.dim() - x_mapped == 3
    if x_mapped:
        x = x.flatten(0, 1) if per_slot else x[:, None].expand(-1, slots, -1, -1).flatten(0, 1)
    elif per_slot:  # a single slot of an input that every sample shares is the shared form
        x = x[0] if slots == 1 else x.expand(batch, *x.shape).flatten(0, 1)
    y, _ = op(x, weight, bias, a, b, offsets, scales, index, *rest)
    return (y.unflatten(0, (batch, slots)), x.new_empty(0, dtype=torch.float32)), (0, None)


FORWARD = Kernels("multi_lora", MultiLora, vmap=_vmap)
BACKWARD = once_differentiable("multi_lora_backward", vmap=loop_vmap)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: PackedLora
) -> tuple[Tensor, Tensor, Tensor | None, PackedLora]:
    dtype = torch.get_autocast_dtype(x.device.type)
    lora = dataclasses.replace(lora, a=lora.a.to(dtype), b=lora.b.to(dtype))
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lora


def _check(x: Tensor, weight: Tensor, lora: PackedLora, bias: Tensor | None, mode: str, index: Tensor | None) -> bool:
    """All arguments; returns whether autocast is on for them."""
    if mode not in MODES:
        raise ValueError(f"multi_lora: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(lora, PackedLora):
        raise TypeError(f"multi_lora: lora must be a PackedLora (see PackedLora.pack), got {type(lora).__name__}")
    wanted = {"shared": "[*, K]", "diverged": "[T, *, K]", "routed": "[S, *, K]"}[mode]
    given = {"x": (x, wanted), "weight": (weight, "[N, K]"), "bias": (bias, "[N]"), "index": (index, "[S]")}
    given |= {"lora.a": (lora.a, "[Σr, K]"), "lora.b": (lora.b, "[Σr, N]")}
    given |= {"lora.offsets": (lora.offsets, "[T + 1] or [T, 2]"), "lora.scales": (lora.scales, "[T]")}
    for name, (tensor, shape) in given.items():
        if tensor is not None or name not in ("bias", "index"):
            check_tensor("multi_lora", name, tensor, shape)
    _check_ranks(lora)
    least = 1 if mode == "shared" else 2
    if x.dim() < least or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"multi_lora: x must be {wanted} and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    if mode == "diverged" and x.shape[0] != lora.num_adapters:
        raise ValueError(
            f"multi_lora: x must be [T, *, K] with T = {lora.num_adapters} in mode 'diverged', got {list(x.shape)}"
        )
    (outputs, inputs), rows = weight.shape, lora.a.shape[0] if lora.has_spans else lora.total_rank
    if lora.a.shape != (rows, inputs) or lora.b.shape != (rows, outputs):
        raise ValueError(
            f"multi_lora: lora must fit weight {list(weight.shape)} = [N, K]: wants a [Σr, {weight.shape[1]}] and "
            f"b [Σr, {weight.shape[0]}], got {list(lora.a.shape)} and {list(lora.b.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"multi_lora: bias must be [N] = [{weight.shape[0]}], got {list(bias.shape)}")
    if (index is not None) != (mode == "routed"):
        raise ValueError(f"multi_lora: index goes with mode 'routed' and only with it, got mode {mode!r}")
    device = x.device
    for name, (tensor, _) in given.items():
        if tensor is not None and tensor.device != device:
            check_device("multi_lora", "x", x, name, tensor)
    check_floating("multi_lora", "x", x)
    casts = autocasts(x)
    if not casts:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"multi_lora: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        for name, tensor in (("lora.a", lora.a), ("lora.b", lora.b)):
            if tensor.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"multi_lora: {name} must be {x.dtype} like x, or float32, got {tensor.dtype}")
    if index is not None:
        if index.dtype not in (torch.int32, torch.int64) or index.shape != x.shape[:1]:
            raise ValueError(
                f"multi_lora: index must be int32 or int64 [S] = [{x.shape[0]}], got {index.dtype} {list(index.shape)}"
            )
        _check_index_range(index, lora.num_adapters)
    return casts


def _check_ranks(lora: PackedLora) -> None:
    if not lora.has_sound_ranks:
        raise TypeError(f"multi_lora: lora.ranks must be a tuple of one rank or more, got {lora.ranks!r}")
    count = lora.num_adapters
    spans = lora.offsets.dim() == 2
    for name, tensor, dtype, size in (
        ("lora.offsets", lora.offsets, torch.int32, (count, 2) if spans else (count + 1,)),
        ("lora.scales", lora.scales, torch.float32, (count,)),
    ):
        if tensor.dtype != dtype or tensor.shape != size:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"multi_lora: {name} must be {dtype} {list(size)} for {count} adapters, got {got}")
    if spans and (lora.a.requires_grad or lora.b.requires_grad) and torch.is_grad_enabled():
        raise ValueError("multi_lora: lora.a and lora.b must not require gradients where lora.offsets are [T, 2]")


def _check_index_range(index: Tensor, num_adapters: int) -> None:
    if not readable(index):
        return
    low, high = index.aminmax()
    if low < -1 or high >= num_adapters:
        raise IndexError(
            f"multi_lora: index must be in [-1, {num_adapters}) for {num_adapters} adapters, "
            f"got values from {low.item()} to {high.item()}"
        )
