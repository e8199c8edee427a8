"""Finds what was changed in a model since it was copied, in microseconds, at every call of its runner."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from .._fuse.fused_module import HOOKS
from .structural_copy import OF_EVERY_MODULE

# Each call reads the entries of all containers that modules hold; a container beyond this total is not watched.
MOST_WATCHED = 10_000
#: Values that a copy can take over as they are.
_TAKEN_OVER = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_NOT_ENTERED = (*_TAKEN_OVER, nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)


_ACTIVE = "_active_adapter"  # of PEFT's layers: which one that is, the copy's know by themselves
_PARTS = attrgetter("scaling", "lora_variant", "merged_adapters")  # PEFT's layers have these attributes


class Snapshot:
    """Remembers the identities of all members of ``views``, which are live views of dicts and lists."""

    def __init__(self, views: Sequence) -> None:
        self._views = list(views)
        self.take()

    def take(self) -> None:
        self._held = list(chain.from_iterable(self._views))  # held, so that no id is given to another object
        self._ids = list(map(id, self._held))

    def differs(self) -> bool:
        return list(map(id, chain.from_iterable(self._views))) != self._ids


class Watch:
    """Compares a model with what it was.

    Args:
        model: the model whose parameters, buffers, modules and hooks are watched, at every depth.
        layers: by name the adapted layers in it, as PEFT made them or bare, with the layers that replace them.
        in_turn: the same of modules that run in turn, a task at a time.
        pairs: modules with their copies; their own attributes are watched, and what these hold.
        around: modules that contain ``model``.
        modes: modules with others that follow only their train() and eval().

    Attributes:
        structure: the parts of the model that are compared by identity alone.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, tuple[nn.Module, nn.Module]],
        in_turn: dict[str, tuple[nn.Module, nn.Module]],
        pairs: Sequence[tuple[nn.Module, nn.Module]],
        around: Iterable[nn.Module],
        modes: Sequence[tuple[nn.Module, nn.Module]] = (),
    ) -> None:
        modules = [*model.modules(), *around]
        self._adapted = [*modes, *layers.values(), *in_turn.values()]
        self._layers = {name: layer for name, (layer, _) in layers.items() if hasattr(layer, "lora_A")}
        switched = {name: layer for name, (layer, _) in in_turn.items() if hasattr(layer, "adapter_layer_names")}
        self._switched = self._layers | switched
        self._modules = modules
        self._classes = list(map(type, modules))
        dicts = [d for m in modules for d in (m._parameters, m._buffers, m._modules, *(getattr(m, h) for h in HOOKS))]
        self._empty = [d for d in dicts if not d]
        views = [view for d in dicts if d for view in (d.keys(), d.values())]
        for layer in self._layers.values():
            views += [layer.scaling.keys(), layer.scaling.values(), layer.lora_variant.keys(), layer.merged_adapters]
        self.structure = Snapshot([*views, *_insides(pairs)])
        self._parts = list(chain.from_iterable(map(_PARTS, self._layers.values())))  # a new dict is none of the views
        scales = chain.from_iterable(layer.scaling.values() for layer in self._layers.values())
        self._scales = [(scale, float(scale)) for scale in scales if isinstance(scale, Tensor)]  # written in place
        # The modules inside PEFT's layers and around the model have no other attributes that matter, except new ones.
        copied = {id(original) for original, _ in pairs}
        others = [m for m in modules if id(m) not in copied]
        self._others = list(map(vars, others))
        self._sizes = list(map(len, self._others))
        self._dropouts = [m for m in others if isinstance(m, nn.Dropout)]
        self._probabilities = list(map(attrgetter("p"), self._dropouts))
        self._pairs = list(pairs)
        self._attributes = Snapshot([vars(original).values() for original, _ in pairs])
        self._before = [dict(vars(original)) for original, _ in pairs]

    def disabled(self) -> str | None:
        """Return the name of a layer whose adapters are switched off, or None."""
        return next((name for name, layer in self._switched.items() if layer.disable_adapters), None)

    def is_as_built(self) -> bool:
        """Tell whether structure, hooks and what modules hold are unchanged; copy newly set plain attributes over."""
        if any(self._empty) or self.structure.differs() or list(map(type, self._modules)) != self._classes:
            return False
        if list(map(len, self._others)) != self._sizes:
            return False
        if not all(map(is_, chain.from_iterable(map(_PARTS, self._layers.values())), self._parts)):
            return False
        if any(float(scale) != before for scale, before in self._scales):
            return False
        if list(map(attrgetter("p"), self._dropouts)) != self._probabilities:
            return False
        _follow_mode(self._adapted)
        return not self._attributes.differs() or self._take_over()

    def follow_mode(self) -> None:
        """Take over only train() and eval()."""
        _follow_mode(self._adapted)
        _follow_mode(self._pairs)

    def _take_over(self) -> bool:
        """Give the copies the attributes that were set since; return False if one is not a plain value."""
        changes = []
        for place, (original, ours) in enumerate(self._pairs):
            now, before = vars(original), self._before[place]
            for name in now.keys() | before.keys():
                value = now.get(name, _MISSING)
                if value is before.get(name, _MISSING) or name == _ACTIVE:
                    continue
                if value is not _MISSING and not isinstance(value, _TAKEN_OVER):
                    return False
                changes.append((place, ours, name, value))
        for place, ours, name, value in changes:
            if value is _MISSING:
                vars(ours).pop(name, None)
                del self._before[place][name]
            else:
                vars(ours)[name] = self._before[place][name] = value
        self._attributes.take()
        return True


def _insides(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> list:
    """Return live views of the lists, dicts and objects, at any depth, of which the modules' copies have their own."""
    views, seen, left = [], set(), MOST_WATCHED
    todo = [
        (value, vars(ours).get(name))
        for original, ours in pairs
        for name, value in vars(original).items()
        if name not in OF_EVERY_MODULE
    ]
    while todo:
        value, copied = todo.pop()
        if value is copied or type(value) is not type(copied) or isinstance(value, _NOT_ENTERED) or id(value) in seen:
            continue
        seen.add(id(value))
        if not isinstance(value, _CONTAINERS):
            value, copied = getattr(value, "__dict__", {}), getattr(copied, "__dict__", {})
        if len(value) > left:
            continue
        left -= len(value)
        if isinstance(value, dict):
            views += [value.keys(), value.values()]
            todo += [(held, copied.get(key)) for key, held in value.items()]
        else:
            views.append(value)
            if not isinstance(value, (set, frozenset)):  # their members have no order, and are seldom changed
                todo += zip(value, copied, strict=False)
    return views


def _follow_mode(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    for original, ours in pairs:
        if ours.training is not original.training:
            ours.training = original.training


_MISSING = object()
