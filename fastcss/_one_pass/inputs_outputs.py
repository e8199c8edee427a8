"""Flattens a model's arguments and outputs, of any nesting, into lists of leaves that can get or lose an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dispatch.private_apis import pytree

_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Holds the arguments of one call of a model; ``each`` has keyword arguments [T, …] with a slice for each task."""

    args: tuple
    kwargs: dict
    each: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def call(self, model: Callable, each: Sequence[Tensor] = ()) -> object:
        """Call the model for one task, whose own slices are ``each``."""
        return model(*self.args, **self.kwargs, **dict(zip(self.each, each, strict=True)))

    def of(self, tasks: slice) -> Inputs:
        return dataclasses.replace(self, each={name: tensor[tasks] for name, tensor in self.each.items()})

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that all tasks have in common."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> tuple:
        return tuple((tensor.shape, tensor.dtype) for tensor in (*self.tensors, *self.each.values()))


@dataclasses.dataclass(frozen=True)
class Output:
    """Holds what a model returned for several slots: tasks, or samples that each have an adapter.

    Attributes:
        leaves: tensors, with a leading slot axis if ``mapped``, and plain values.
        mapped: says for each leaf whether it has that axis; one without it is the same in every slot.
        structure: says how the leaves make up the model's own output type.
        size: the number of slots.
    """

    leaves: list
    mapped: list[bool]
    structure: pytree.TreeSpec
    size: int

    @classmethod
    def of(cls, returned: object, is_mapped: Callable[[Tensor], bool], size: int) -> Output:
        leaves, structure = pytree.tree_flatten(returned)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise TypeError(
                    f"one_pass: the model's output holds a {type(leaf).__name__}, which can get no task axis; "
                    "turn it off (use_cache=False, …) or register the type with torch.utils._pytree"
                )
        return cls(leaves, [isinstance(leaf, Tensor) and is_mapped(leaf) for leaf in leaves], structure, size)

    def mapped_leaves(self) -> list[Tensor]:
        return [leaf for leaf, mapped in zip(self.leaves, self.mapped, strict=True) if mapped]

    def with_mapped_leaves(self, tensors: Sequence[Tensor]) -> Output:
        left = iter(tensors)
        leaves = [next(left) if mapped else leaf for leaf, mapped in zip(self.leaves, self.mapped, strict=True)]
        return dataclasses.replace(self, leaves=leaves)

    def expanded(self) -> object:
        """Return the model's own output type, with a leading slot axis on every tensor."""

        def expand(leaf: object, mapped: bool) -> object:
            return leaf.expand(self.size, *leaf.shape) if isinstance(leaf, Tensor) and not mapped else leaf

        return pytree.tree_unflatten(list(map(expand, self.leaves, self.mapped)), self.structure)


def task_axis_second(output: object) -> object:
    """Move the task axis of every tensor behind its first other axis."""

    def moved(leaf: object) -> object:
        return leaf.movedim(0, 1) if isinstance(leaf, Tensor) and leaf.dim() > 1 else leaf

    return pytree.tree_map(moved, output)


def join(outputs: Sequence[Output]) -> Output:
    """Put the slots of ``outputs`` one after the other."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if any(output.structure != first.structure for output in outputs):
        raise ValueError(
            "one_pass: the model's output has another structure for each adapter, so they cannot be joined; call the "
            "runner for each by itself, adapters=[name]"
        )
    for output in outputs[1:]:
        _check_plain(first.leaves, output.leaves)
    mapped = [_has_slots(i, outputs) for i in range(len(first.leaves))]
    leaves = [_join_leaf(outputs, i) if is_it else first.leaves[i] for i, is_it in enumerate(mapped)]
    return Output(leaves, mapped, first.structure, sum(output.size for output in outputs))


def _has_slots(i: int, outputs: Sequence[Output]) -> bool:
    """Tell whether leaf ``i`` has a slot axis, or is another tensor in each of ``outputs``.

    Even a leaf that no adapter touches may differ between them.
    """
    first = outputs[0].leaves[i]
    return any(o.mapped[i] or (isinstance(first, Tensor) and o.leaves[i] is not first) for o in outputs)


def _check_plain(leaves: Sequence, others: Sequence) -> None:
    """Raise if a value that is no tensor, and so can have no slot axis, differs from slot to slot."""
    for one, other in zip(leaves, others, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            continue
        if type(one) is not type(other) or (one != other and one == one):
            raise ValueError(
                f"one_pass: the model's output holds a plain value that differs between the adapters ({one!r} and "
                f"{other!r}); as a tensor it would have a place for each"
            )


def _join_leaf(outputs: Sequence[Output], i: int) -> Tensor:
    values = [output.leaves[i] for output in outputs]
    parts = [v if o.mapped[i] else v.expand(o.size, *v.shape) for v, o in zip(values, outputs, strict=True)]
    shapes = dict.fromkeys(str(list(part.shape[1:])) for part in parts)
    if len(shapes) > 1:
        raise ValueError(
            f"one_pass: an output has another shape for each adapter ({', '.join(shapes)}), so they cannot be joined; "
            "call the runner for each by itself, adapters=[name]"
        )
    return torch.cat(parts)
