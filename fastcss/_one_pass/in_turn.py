"""Runs a module that each task has for itself: in turn, on the task's own slice, inside of a pass over all tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch.private_apis import DisableTorchFunction, pytree
from .adapted_layer import AFTER_THE_CALL, Slots
from .leaked_values import mark, origin_of
from .shared_work import SharedWork, version
from .task_rules import Disagreement, on_physical_tensors


class InTurn:
    """Stands before a module's class, and calls ``of_task`` once for each task of a pass.

    Under ``torch.vmap`` the inputs are cut into the tasks' slices, and what comes of these is put side by side. Each
    task's result is to the bit what the module gives it alone, whatever the module does with its inputs and buffers.
    """

    slots: Slots
    training: bool

    def of_task(self, *args, **kwargs) -> object:
        """Run for the one task in ``slots.tasks``, or for none if that is empty."""
        raise NotImplementedError

    def common(self) -> list[Tensor]:
        """Return the tensors of this module that all tasks read: what depends on nothing else is computed once."""
        return []

    def covers(self, tasks: tuple[int, ...]) -> bool:
        """Tell whether one of ``tasks`` has its own module here."""
        raise NotImplementedError

    def forward(self, *args, **kwargs) -> object:
        slots = self.slots
        if not slots.running:
            raise RuntimeError(AFTER_THE_CALL)
        if slots.axis is not None:
            return self._of_each_task(args, kwargs)
        result = self.of_task(*args, **kwargs)
        if not self.covers(slots.tasks):
            return result
        return pytree.tree_map_only(Tensor, lambda leaf: _of_this_task(leaf, slots.origin(slots.tasks)), result)

    def _of_each_task(self, args: tuple, kwargs: dict) -> object:
        slots = self.slots
        leaves, structure = pytree.tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        joined: list = []

        def each(_: int, dims: tuple, axis: Tensor, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple]:
            shared = [tensor for tensor, dim in zip(tensors, dims[1:], strict=True) if dim is None]
            before = list(map(version, shared))
            common = self.common() if shared and not self.training else []
            results = []
            with SharedWork([*shared, *common]) if common else contextlib.nullcontext():
                for slot, tasks in enumerate(_tasks_of(slots, axis)):
                    for place, tensor, dim in zip(places, tensors, dims[1:], strict=True):
                        leaves[place] = tensor if dim is None else tensor.select(dim, slot)
                    args, kwargs = pytree.tree_unflatten(leaves, structure)
                    with slots.hold(tasks=tasks, rules=slots.rules):
                        results.append(pytree.tree_flatten(self.of_task(*args, **kwargs)))
            if list(map(version, shared)) != before:
                raise Disagreement("a module that each task has for itself writes an input that the tasks share")
            joined[:] = _joined(results, {id(tensor) for tensor in shared})
            given = [(value, dim) for value, dim in joined[0] if isinstance(value, Tensor)]
            return tuple(value for value, _ in given), tuple(dim for _, dim in given)

        tensors = iter(on_physical_tensors(each, slots.axis, *(leaves[place] for place in places)))
        values, form = joined
        return pytree.tree_unflatten([next(tensors) if isinstance(v, Tensor) else v for v, _ in values], form)


def _tasks_of(slots: Slots, axis: Tensor) -> list[tuple[int, ...]]:
    """Return what each slot runs: its task, or none."""
    if not slots.routed:
        return [(task,) for task in slots.tasks]
    return [() if task < 0 else (task,) for task in axis.tolist()]


def _joined(results: Sequence[tuple[list, pytree.TreeSpec]], shared: set[int]) -> tuple[list, pytree.TreeSpec]:
    """Put the leaves of each task's result side by side; return (leaf, dim of the tasks) of each, and their form."""
    form = results[0][1]
    if any(other != form for _, other in results):
        raise Disagreement("a module that each task has for itself returns another structure for each")
    with DisableTorchFunction():
        return [_joined_leaf(values, shared) for values in zip(*(leaves for leaves, _ in results), strict=True)], form


def _joined_leaf(values: Sequence, shared: set[int]) -> tuple[object, int | None]:
    first = values[0]
    if not isinstance(first, Tensor):
        if any(type(value) is not type(first) or value != first for value in values):
            raise Disagreement(f"a module that each task has for itself returns a plain value of each, {values}")
        return first, None
    if id(first) in shared and all(value is first for value in values):
        return first, None
    if len({(value.shape, value.dtype) if isinstance(value, Tensor) else None for value in values}) > 1:
        raise Disagreement("a module that each task has for itself returns another shape or dtype for each")
    return (first[None] if len(values) == 1 else torch.stack(list(values))), 0


def _of_this_task(leaf: Tensor, origin: tuple) -> Tensor:
    """Mark ``leaf`` as dependent on the adapter; what other tasks may share of it they find without the mark."""
    if origin_of(leaf) == origin:
        return leaf
    with DisableTorchFunction():
        return mark(leaf.view_as(leaf), origin)
