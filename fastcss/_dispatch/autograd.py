"""Gives the raw ops their gradients, under every transform of torch, and torch.vmap as a larger batch.

A raw op has its gradient in two places, from one ``torch.autograd.Function``. What ``Kernels`` gives for a call asks
whether autograd has anything to record, and goes to the Function, or past autograd, by itself: that is the quicker. The
raw op itself has the same Function at torch's dispatch key for autograd, for whoever meets the op in the dispatcher:
``torch.compile`` and ``torch.export``, whose graphs name raw ops, and ``torch.func``, whose levels each come by there.
Without it torch would drop the gradient, and a tangent, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from .._schema import COMPILED, LIBRARY
from .private_apis import (
    BelowAutograd,
    SingleLevelFunction,
    after_autograd_keyset,
    any_requires_grad,
    enable_single_level_autograd_function,
    forward_mode,
    forward_mode_enabled,
    get_unwrapped,
    is_wrapped,
    tracing_state,
    transforms_are_active,
)


class Kernels:
    """The implementations of the raw op ``name``, differentiable by ``function``.

    Args:
        function: its ``forward`` has the arguments of the raw op and then the name of the implementation, and calls
            ``beneath``.
        vmap: what the mapped axis becomes, ``fold_vmap`` or the like.

    Attributes:
        beneath: implementation → the raw op where autograd is not asked any more.
    """

    def __init__(self, name: str, function: type[torch.autograd.Function], *, vmap: Callable) -> None:
        self.beneath: dict[str, Callable] = {}
        self._calls: dict[str, Callable] = {}
        function.jvp = staticmethod(_no_tangents(name))
        for impl, op in kernels(name).items():
            self.beneath[impl] = _beneath(op)
            self._calls[impl] = _call(op, function, impl)
            LIBRARY.impl(f"{name}.{impl}", _at_autograd_key(op, function, impl), "Autograd", with_keyset=True)
        register_vmap(name, vmap)

    def __getitem__(self, impl: str) -> Callable:
        return self._calls[impl]


def once_differentiable(name: str, *, vmap: Callable) -> Kernels:
    """The raw op ``name`` of an op's backward pass: differentiating its gradients (create_graph=True) raises."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            *arguments, impl = arguments
            return backward.beneath[impl](*arguments)

        @staticmethod
        def backward(ctx, *_):
            op = name.removesuffix("_backward")
            raise RuntimeError(f"{op}: differentiable once only; for second derivatives use impl='composed'")

    backward = Kernels(name, Gradient, vmap=vmap)
    return backward


def kernels(name: str) -> dict[str, Callable]:
    """Implementation → raw op."""
    return {impl: getattr(getattr(torch.ops.fastcss, name), impl) for impl in COMPILED}


def _call(op: Callable, function: type[torch.autograd.Function], impl: str) -> Callable:
    def call(*arguments):
        if is_compiling() or transforms_are_active() or tracing_state() is not None:
            return op(*arguments)
        if (is_grad_enabled() and any_requires_grad(*arguments)) or forward_mode():
            return function.apply(*arguments, impl)
        with BelowAutograd():
            return op(*arguments)

    return call


def _at_autograd_key(op: Callable, function: type[torch.autograd.Function], impl: str) -> Callable:
    # The dispatcher gives one level of torch.func at a time; the outer ones come by when `beneath` goes on to them.
    methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward", "jvp")}
    one_level = type(function.__name__, (SingleLevelFunction,), methods)

    def kernel(keyset, *arguments):
        if not (is_grad_enabled() and any_requires_grad(*arguments)) and not forward_mode():
            with BelowAutograd():
                return op.redispatch(keyset & after_autograd_keyset, *arguments)
        with enable_single_level_autograd_function():
            return one_level.apply(*arguments, impl)

    return kernel


def _beneath(op: Callable) -> Callable:
    def beneath(*arguments):
        if not transforms_are_active():
            with BelowAutograd():
                return op(*arguments)
        # A Function turns both modes off for its forward pass, where torch.func's outer levels have yet to record it.
        with torch.enable_grad(), forward_mode_enabled(True), BelowAutograd():
            return op(*arguments)

    return beneath


def _no_tangents(name: str) -> Callable:
    def jvp(ctx, *tangents):
        op = name.removesuffix("_backward")
        raise NotImplementedError(
            f"{op}: the compiled implementations have no forward-mode derivatives (jvp, jacfwd, hessian); use "
            "impl='composed', or impl='auto' within the transform"
        )

    return jvp


def needs_grad(*tensors: Tensor | None) -> bool:
    """Autograd must see a call on these."""
    return is_grad_enabled() and any(tensor is not None and _requires_grad(tensor) for tensor in tensors)


def _requires_grad(tensor: Tensor) -> bool:
    """Look beneath the wrapper of torch.vmap, too: it says no even if the tensor in it requires gradients."""
    if not is_compiling():
        while not tensor.requires_grad and is_wrapped(tensor):
            tensor = get_unwrapped(tensor)
    return tensor.requires_grad


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
