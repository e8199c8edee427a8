"""What the ops' autograd functions share: gradients that are once differentiable, and vmap as a larger batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._schema import COMPILED, LIBRARY


def kernels(name: str) -> dict[str, Callable]:
    """Implementation → raw op."""
    return {impl: getattr(getattr(torch.ops.fastcss, name), impl) for impl in COMPILED}


def needs_grad(*tensors: Tensor | None) -> bool:
    """Autograd must see a call on these."""
    return torch.is_grad_enabled() and any(tensor is not None and requires_grad(tensor) for tensor in tensors)


def requires_grad(tensor: Tensor) -> bool:
    """Also of a tensor mapped by torch.vmap, whose wrapper says no where what it wraps says yes."""
    if not torch.compiler.is_compiling():
        while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def once_differentiable(op: str, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients tied to what they were computed from, so that differentiating them (create_graph=True) raises."""
    if not torch.is_grad_enabled():
        return grads
    return _OnceDifferentiable.apply(op, len(inputs), *inputs, *grads)


class _OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op, count, *tensors):
        return tuple(None if g is None else g.view_as(g) for g in tensors[count:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: differentiable once only; for second derivatives use impl='composed'")


def fold_vmap(op: Callable, batch: int, in_dims: Sequence[int | None], arguments: Sequence):
    """Run ``op``, whose tensors all have a batch in front, on a vmapped axis as a larger batch.

    A tensor that is not mapped is repeated by stride only. Returns what a vmap rule returns.
    """
    folded, inner = [], 1
    for value, dim in zip(arguments, in_dims, strict=True):
        if isinstance(value, Tensor) and not _unused(value):
            value = value.movedim(dim, 0) if dim is not None else value.expand(batch, *value.shape)
            inner = value.shape[1]
            value = value.flatten(0, 1)
        folded.append(value)
    outputs = op(*folded)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (batch, inner)), 0
    unfolded = tuple(v if _unused(v) else v.unflatten(0, (batch, inner)) for v in outputs)
    return unfolded, tuple(None if _unused(v) else 0 for v in outputs)


def _unused(tensor: Tensor) -> bool:
    """Stands for an optional tensor that is not there."""
    return tensor.shape == (0,)


def loop_vmap(op: Callable, batch: int, in_dims: Sequence[int | None], arguments: Sequence):
    """Run ``op`` once a sample of a vmapped axis, for ops that reduce over their batch."""
    calls = [
        op(*(v.select(dim, i) if dim is not None else v for v, dim in zip(arguments, in_dims, strict=True)))
        for i in range(batch)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


def register_vmap(name: str, rule: Callable) -> None:
    """Give the raw op ``name`` of every implementation the rule ``fold_vmap`` or ``loop_vmap``."""
    for op in kernels(name).values():

        def mapped(info, in_dims, *arguments, op=op):
            return rule(op, info.batch_size, in_dims, arguments)

        torch.library.register_vmap(op, mapped, lib=LIBRARY)
