"""Adds rules for a model's own calls under the task axis of ``torch.vmap``.

vmap has a rule for nearly every op. ``TaskRules`` adds what it lacks while a model runs: attention, for which it would
loop over the tasks on CPU; group normalisation of images with their channels last; branches on a value, which it
refuses even if all tasks agree on the value; and writes of the tasks' values into a tensor that the model has just
made and that has no task axis yet. Linear layers go to the project's own GEMM where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._dispatch.private_apis import (
    HigherOrderOperator,
    beneath_transform,
    get_unwrapped,
    has_alias,
    is_vmapped,
    pytree,
    vmap_level,
    with_vmap_axis,
    without_vmap_axis,
)
from .._fuse.linear import linear
from .leaked_values import Mapped, OneTask


class Disagreement(RuntimeError):
    """The model branches on, or shares, a value that differs between the tasks."""


def is_mapped(value: object) -> bool:
    """Tell whether ``value`` is a tensor with a hidden axis of ``torch.vmap``."""
    return isinstance(value, Tensor) and is_vmapped(value)


def on_physical_tensors(call: Callable, *tensors: Tensor | None) -> Tensor:
    """Call ``call(size, dims, *tensors) → (result, dim)`` on the tensors with their mapped axes visible.

    ``dims`` has one entry per tensor, None for one that is not mapped. At least one tensor must be mapped. Gradients
    flow through ``call``.
    """
    level = vmap_level()
    if level is None:
        raise NotImplementedError(
            "one_pass: the model differentiates in its own forward pass (torch.func), which does not run under vmap"
        )
    # This does what torch does for the vmap method of an autograd.Function, in a tenth of the time.
    physical = [(t, None) if t is None else without_vmap_axis(t, level) for t in tensors]
    values, dims = zip(*physical, strict=True)
    mapped = next(((value, dim) for value, dim in physical if dim is not None), None)
    with beneath_transform():
        if mapped is None:  # only a vmap around the runner maps them
            return on_physical_tensors(call, *tensors)
        value, dim = mapped
        result, dim = call(value.shape[dim], dims, *values)
    return _with_axis(result, dim, level)


def _with_axis(result: Tensor | tuple, dim: int | tuple | None, level: int) -> Tensor | tuple:
    if isinstance(result, tuple):
        return tuple(_with_axis(each, d, level) for each, d in zip(result, dim, strict=True))
    return result if dim is None else with_vmap_axis(result, dim, level)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run linear with the mapped axis among its rows, as one GEMM that includes the bias."""
    if is_mapped(weight) or is_mapped(bias):
        return F.linear(input, weight, bias)
    if not is_mapped(input):
        return linear(input, weight, bias)
    return on_physical_tensors(lambda _, dims, x: (linear(x.movedim(dims[0], 0), weight, bias), 0), input)


def _attention(*args, **kwargs) -> Tensor:
    """Run scaled_dot_product_attention with the mapped axis folded into its batch."""
    if not any(map(is_mapped, (*args, *kwargs.values()))):
        return F.scaled_dot_product_attention(*args, **kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors = [given.pop(name, None) for name in names[:4]]

    def fold(size: int, dims: tuple, *tensors: Tensor | None) -> tuple[Tensor, int]:
        logical = [
            t.shape if d is None else t.movedim(d, 0).shape[1:]
            for t, d in zip(tensors, dims, strict=True)
            if t is not None
        ]
        rank = max(len(shape) for shape in logical)
        batch = torch.broadcast_shapes(*(shape[:1] if len(shape) == rank else (1,) for shape in logical))[0]

        def into_batch(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None or (dim is None and (t.dim() < rank or t.shape[0] == 1) and t is tensors[3]):
                return t  # a mask that broadcasts over the batch does so over the tasks
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            t = t.reshape(size, *[1] * (rank + 1 - t.dim()), *t.shape[1:])
            return t.expand(size, batch, *t.shape[2:]).flatten(0, 1)

        folded = [into_batch(t, d) for t, d in zip(tensors, dims, strict=True)]
        return F.scaled_dot_product_attention(*folded, **given).unflatten(0, (size, batch)), 0

    return on_physical_tensors(fold, *tensors)


def _flex_attention(operator: Callable, query: Tensor, key: Tensor, value: Tensor, *rest, **kwargs) -> tuple:
    """Run flex_attention task by task: its masks and scores are functions of the batch index, which must not change."""

    def each(size: int, dims: tuple, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        slices = [[t if d is None else t.select(d, s) for t, d in zip(tensors, dims, strict=True)] for s in range(size)]
        results = zip(*(operator(*qkv, *rest, **kwargs) for qkv in slices), strict=True)
        results = [torch.stack(result) for result in results]
        return tuple(results), (0,) * len(results)

    return on_physical_tensors(each, query, key, value)


def _isin(elements: Tensor, test_elements: Tensor, **kwargs) -> Tensor:
    """Run torch.isin for mapped elements and one set."""
    if not is_mapped(elements) or is_mapped(test_elements):
        return torch.isin(elements, test_elements, **kwargs)
    return on_physical_tensors(lambda _, dims, e: (torch.isin(e, test_elements, **kwargs), dims[0]), elements)


def _group_norm(input: Tensor, *args, **kwargs) -> Tensor:
    """Run group_norm on a contiguous input: vmap cannot tell group_norm the layout of one with its channels last."""
    return F.group_norm(input.contiguous() if is_mapped(input) else input, *args, **kwargs)


def _agreed(function: Callable) -> Callable:
    """Make ``bool(t)``, ``t.item()``, … return the one value that all tasks have."""

    def read(tensor: Tensor, *args):
        if not is_mapped(tensor):
            return function(tensor, *args)
        if tensor.numel() != 1:
            function(torch.empty(tensor.shape, dtype=tensor.dtype), *args)  # raises as torch does
        while is_mapped(tensor):
            tensor = get_unwrapped(tensor)
        values = tensor.detach().flatten().tolist()
        first = values[0]
        if any(v != first and not (math.isnan(v) and math.isnan(first)) for v in values[1:]):
            raise Disagreement(
                f"the model branches on a value that differs between the tasks ({function.__name__} of {values})"
            )
        return function(tensor.detach().flatten()[0], *args)

    return read


def _writes(func: Callable) -> bool:
    """Tell whether ``func`` writes its first argument: ``x[i] = y``, ``x += y``, ``x.masked_fill_(…)``."""
    name = func.__name__
    return name in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _give_axis(target: Tensor, mapped: Tensor) -> Tensor:
    """Return a tensor with a copy of ``target`` for each task."""
    return on_physical_tensors(lambda size, dims, t, _: (t.expand(size, *t.shape).clone(), 0), target, mapped)


_READERS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, torch.is_nonzero)
# PEFT's layers call these functions on an adapter's weights.
_OF_A_LORA_LAYER = (F.linear, F.conv2d, Tensor.T.__get__)
_WRITERS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__")
RULES: dict[Callable, Callable] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _group_norm,
    torch.isin: _isin,
    **{reader: _agreed(reader) for reader in _READERS},
}


class TaskRules(TorchFunctionMode):
    """Applies the rules to a model's calls.

    Args:
        owned: ids of the tensors that outlive the call (weights, inputs); no write may give them a task axis.
        before_write: is called with each tensor without a task axis that a call is about to write.
        mapped: follows the results with a task axis, under vmap.
        one_task: follows the values that depend on the adapter, in one adapter's pass.
        adapters: id of each adapter's tensor → its layer; only the layer that replaces it may read the tensor.
    """

    def __init__(
        self,
        owned: Set[int],
        *,
        before_write: Callable[[Tensor], None] | None = None,
        mapped: Mapped | None = None,
        one_task: OneTask | None = None,
        adapters: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._adapters = adapters
        self._owned, self._before_write, self._mapped, self._one_task = owned, before_write, mapped, one_task

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._one_task is not None:
            depends = self._one_task.depends(func, args, kwargs)
            result = self._call(func, args, kwargs)
            if depends:
                self._one_task.follow(result)
            return result
        result = self._call(func, args, kwargs)
        if self._mapped is not None and is_mapped(result):
            self._mapped.add(result)
        return result

    def _call(self, func: Callable, args: tuple, kwargs: dict):
        if func in _OF_A_LORA_LAYER:
            self._refuse_a_lora_layer(args)
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if isinstance(func, HigherOrderOperator) and func.name() == "flex_attention" and any(map(is_mapped, args[:3])):
            return _flex_attention(func, *args, **kwargs)
        if _writes(func) and isinstance(args[0], Tensor) and not is_mapped(args[0]):
            if self._before_write is not None:
                self._before_write(args[0])
            mapped = next(filter(is_mapped, pytree.tree_leaves((args, kwargs))), None)
            if mapped is not None:
                return self._write(func, mapped, *args, **kwargs)
        return func(*args, **kwargs)

    def _refuse_a_lora_layer(self, args: tuple) -> None:
        layer = next((self._adapters[id(value)] for value in args[:2] if id(value) in self._adapters), None)
        if layer is not None:
            raise TypeError(
                f"one_pass: the model's own LoRA layer {layer!r} ran, with its active adapter for all tasks: something "
                "refers to it that the runner could not see into (a function's globals, an object of another kind)"
            )

    def _write(self, func: Callable, mapped: Tensor, target: Tensor, *args, **kwargs) -> Tensor | None:
        if id(target) in self._owned or has_alias(target):
            raise Disagreement(
                f"the model writes a value that differs between the tasks into a tensor they share ({func.__name__})"
            )
        fresh = _give_axis(target, mapped)
        result = func(fresh, *args, **kwargs)
        torch.utils.swap_tensors(target, fresh)  # the model's own reference now is the tensor with the task axis
        return target if result is not None else None
