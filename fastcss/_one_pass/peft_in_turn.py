"""Runs PEFT's own layers, each for the adapter of the present pass: kinds of adapters that have no layer of ours.

Such a layer reads its active adapter at every call. In a runner's copy of a model that is the task of the thread's
present pass, so nothing is switched, and the user's layers and what of them requires gradients stay as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence

from torch import Tensor, nn

from .adapted_layer import Slots
from .in_turn import InTurn
from .peft_layers import tensors_of
from .task_rules import Disagreement


def run_in_turn(layer: nn.Module, names: Sequence[str], slots: Slots) -> None:
    """Make ``layer``, a copy of one of PEFT's, run the adapter of the present pass."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    vars(layer).pop("_active_adapter", None)
    layer.slots, layer.names = slots, tuple(names)
    layer.own = frozenset(task for task, name in enumerate(names) if tensors_of(layer, name))
    layer.skips_others = not isinstance(layer, (AuxiliaryTrainingWrapper, TrainableTokensLayer))
    layer.__class__ = _class_in_turn(type(layer))


@functools.cache
def _class_in_turn(cls: type[nn.Module]) -> type[nn.Module]:
    return types.new_class(f"InTurn{cls.__name__}", (PeftInTurn, cls))


class PeftInTurn(InTurn):
    """Stands before the class of one of PEFT's layers, whose active adapter is the task of the present pass."""

    names: tuple[str, ...]
    own: frozenset[int]  # the tasks that have weights here
    skips_others: bool  # PEFT sets any adapter active here; where it does not, none is, for those without weights

    @property
    def _active_adapter(self) -> list[str]:
        if self.slots.axis is not None:
            raise Disagreement(f"the model reads a part of {type(self).__name__} that each task has for itself")
        present = [self.names[task] for task in self.slots.tasks]
        if self.skips_others:
            return present
        return [name for name in present if self.names.index(name) in self.own]

    def of_task(self, *args, **kwargs) -> object:
        return super(InTurn, self).forward(*args, **kwargs)

    def common(self) -> list[Tensor]:
        """Return the base layer's tensors: on an input that no adapter has touched it runs once for all tasks."""
        base = self._modules.get("base_layer")  # other names are looked up in the present task's module
        return [] if base is None else [*base.parameters(), *base.buffers()]

    def covers(self, tasks: tuple[int, ...]) -> bool:
        return not self.own.isdisjoint(tasks)
