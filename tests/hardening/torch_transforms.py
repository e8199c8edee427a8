"""Pairs each transform of torch with what it means in plain calls and first derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

#: Takes tensors and returns one. A transform makes another such function of it.
Function = Callable[..., Tensor]
#: ``forward`` or ``backward``.
Direction = Callable[[Function, Sequence[Tensor]], tuple[Tensor, ...]]


class Transform(NamedTuple):
    """Pairs what torch does with what that means in plain calls and first derivatives of torch.autograd."""

    by_torch: Callable[[Function, Sequence[Tensor]], Function]
    by_hand: Callable[[Function, Sequence[Tensor]], Function]


def compiled(f: Function, _) -> Function:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


def exported(f: Function, tensors: Sequence[Tensor]) -> Function:
    return torch.export.export(_Calls(f), tuple(tensors)).module()


def in_functional_call(f: Function, tensors: Sequence[Tensor]) -> Function:
    module = _Holds(f, [torch.zeros_like(t) for t in tensors])

    def call(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(module, {f"tensor_{i}": t for i, t in enumerate(tensors)}, ())

    return call


def checkpointed(f: Function, _) -> Function:
    return lambda *tensors: checkpoint(f, *tensors, use_reentrant=False)


def mapped(f: Function, _) -> Function:
    return lambda *tensors: torch.vmap(f)(*map(_two, tensors))


def in_a_loop(f: Function, _) -> Function:
    return lambda *tensors: torch.stack([f(*one) for one in zip(*map(_two, tensors), strict=True)])


def gradient(f: Function, _) -> Function:
    def call(*tensors: Tensor) -> Tensor:
        by = tuple(range(len(tensors)))
        return _flat(torch.func.grad(lambda *t: f(*t).square().sum(), by)(*tensors))

    return call


def gradient_by_hand(f: Function, _) -> Function:
    def call(*tensors: Tensor) -> Tensor:
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            return _flat(grads(f(*leaves).square().sum(), leaves, create_graph=True))

    return call


def tangent(f: Function, _) -> Function:
    return lambda *tensors: torch.func.jvp(f, tensors, tuple(map(torch.cos, tensors)))[1]


def tangent_by_hand(f: Function, _) -> Function:
    """The gradient by v of the gradient ``vᵀ J``, along the direction."""

    def call(*tensors: Tensor) -> Tensor:
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = f(*leaves)
            v = torch.zeros_like(y, requires_grad=True)
            along = sum(
                (g * t.cos()).sum() for g, t in zip(grads(y, leaves, v, create_graph=True), leaves, strict=True)
            )
            return grads(along, [v], create_graph=True)[0]

    return call


def same(f: Function, _) -> Function:
    return f


TRANSFORMS = {
    "compile": Transform(compiled, same),
    "export": Transform(exported, same),
    "vmap": Transform(mapped, in_a_loop),
    "grad": Transform(gradient, gradient_by_hand),
    "jvp": Transform(tangent, tangent_by_hand),
    "functional_call": Transform(in_functional_call, same),
    "checkpoint": Transform(checkpointed, same),
}


class _Calls(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.f(*tensors)


class _Holds(nn.Module):
    def __init__(self, f: Function, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.f, self.count = f, len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{i}", tensor)

    def forward(self) -> Tensor:
        return self.f(*(getattr(self, f"tensor_{i}") for i in range(self.count)))


def _two(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor.roll(1, -1)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def grads(y: Tensor, leaves: Sequence[Tensor], *args, **kwargs) -> tuple[Tensor, ...]:
    if not y.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(y, leaves, *args, materialize_grads=True, **kwargs)


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """torch's compiler leaves the levels of torch.func that it was in when it failed."""
    torch.compiler.reset()
    try:
        yield
    finally:
        while torch._C._functorch.peek_interpreter_stack() is not None:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
        forward_ad._current_level, eager_transforms.JVP_NESTING = -1, 0
        with contextlib.suppress(RuntimeError):  # none was left
            torch._C._exit_dual_level(level=0)
