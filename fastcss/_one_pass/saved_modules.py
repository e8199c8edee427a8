"""Holds what stands in a model's copy for a module that adapters were saved with whole (PEFT's ``modules_to_save``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .adapted_layer import Slots
from .in_turn import InTurn
from .structural_copy import StructuralCopy
from .task_rules import Disagreement


class SavedModules(InTurn, nn.Module):
    """Runs the module that an adapter was saved with (PEFT's ``modules_to_save``) in place of the model's own.

    Attributes:
        original_module: the model's own, for adapters that have none, and for the bare model.
        modules_to_save: the adapters' modules, by the adapters' names.
    """

    def __init__(self, names: Sequence[str], slots: Slots) -> None:
        super().__init__()
        self.names, self.slots = tuple(names), slots
        self.modules_to_save = nn.Module()

    def fill(self, original: nn.Module, own: Sequence[nn.Module | None]) -> None:
        self.original_module = original
        # Names of adapters may be what ModuleDict does not take: "keys", or with a dot.
        pairs = zip(self.names, own, strict=True)
        self.modules_to_save._modules.update((name, module) for name, module in pairs if module is not None)
        self._own = list(own)

    def tensors(self, task: int) -> list[Tensor]:
        own = self._own[task]
        return [] if own is None else [*own.parameters(), *own.buffers()]

    def covers(self, tasks: tuple[int, ...]) -> bool:
        return any(self._own[task] is not None for task in tasks)

    def forward(self, *args, **kwargs) -> object:
        slots = self.slots
        if slots.running and not slots.routed and not self.covers(slots.tasks):
            return self.original_module(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def of_task(self, *args, **kwargs) -> object:
        return self._present()(*args, **kwargs)

    def _present(self) -> nn.Module:
        own = [self._own[task] for task in self.slots.tasks] if self.slots.running else []
        return self.original_module if own in ([], [None]) else own[0]

    def __getattr__(self, name: str):
        # Models read what the module that this one stands for has: `classifier.out_features`, say.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self._modules:
                raise
        if self.slots.axis is None:
            return getattr(self._present(), name)
        values = [getattr(module, name) for module in (self.original_module, *filter(None, self._own))]
        if all(v is values[0] or (isinstance(v, (bool, int, float, str)) and v == values[0]) for v in values):
            return values[0]
        raise Disagreement(f"the model reads {name!r} of a module that each task has for itself")


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, list]:
    """Return a copy of ``module`` with these parameters and buffers of its own, and the pairs of modules and copies.

    They have the dtype and device of the module's, as PEFT loads them; those that have them already are not copied.
    """
    copy = StructuralCopy(module)
    ours = copy.of(module)
    for name, inner in ours.named_modules():
        for held in (inner._parameters, inner._buffers):
            for key, value in held.items():
                own = tensors.get(f"{name}.{key}" if name else key)
                if own is None:
                    continue
                own = own.to(value.device, value.dtype)
                held[key] = nn.Parameter(own, requires_grad=False) if held is inner._parameters else own
    return ours, copy.pairs
