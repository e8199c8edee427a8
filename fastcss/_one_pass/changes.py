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


_CONFIGS = "peft_config"  # of a model with PEFT's layers: each adapter's, by name
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


class _Modules:
    """Compares modules with what they were: their classes, and the entries of ``dicts`` and ``views``.

    ``others`` are those whose own attributes do not matter, except new ones, and how much they drop.
    """

    def __init__(
        self, modules: Sequence[nn.Module], others: Sequence[nn.Module], dicts: Iterable[dict], views: Iterable = ()
    ) -> None:
        self._modules, dicts = modules, list(dicts)
        self._classes = list(map(type, modules))
        self._empty = [d for d in dicts if not d]
        self.structure = Snapshot([view for d in dicts if d for view in (d.keys(), d.values())] + list(views))
        self._others = list(map(vars, others))
        self._sizes = list(map(len, self._others))
        self._dropouts = [m for m in others if isinstance(m, nn.Dropout)]
        self._probabilities = list(map(attrgetter("p"), self._dropouts))

    @classmethod
    def inside(cls, parts: Iterable[nn.Module]) -> _Modules:
        """Compare the modules at every depth of ``parts``, an adapter's in PEFT's layers."""
        modules = [module for part in parts for module in (part.modules() if part._modules else (part,))]
        return cls(modules, modules, [d for module in modules for d in (*_contents(module), *_hooks(module))])

    def differ(self) -> bool:
        return (
            any(self._empty)
            or self.structure.differs()
            or list(map(type, self._modules)) != self._classes
            or list(map(len, self._others)) != self._sizes
            or list(map(attrgetter("p"), self._dropouts)) != self._probabilities
        )


def _contents(module: nn.Module) -> tuple[dict, dict, dict]:
    return module._parameters, module._buffers, module._modules


def _held_by_name(holder: nn.ModuleDict | nn.ParameterDict) -> dict:
    return holder._modules if isinstance(holder, nn.ModuleDict) else holder._parameters


def _hooks(module: nn.Module) -> list[dict]:
    return list(map(vars(module).get, HOOKS))


class _Membership:
    """Compares what PEFT's layers hold by adapters' names with what they held: modules, parameters and scales.

    ``configs`` are dicts of other things by the adapters' names.
    """

    def __init__(self, layers: Iterable[nn.Module], configs: Iterable[dict]) -> None:
        layers = list(layers)
        children = [child for layer in layers for name, child in layer._modules.items() if name != "base_layer"]
        self.holders = [child for child in children if isinstance(child, (nn.ModuleDict, nn.ParameterDict))]
        self._scalings = [layer.scaling for layer in layers]
        self._dicts = [_held_by_name(holder) for holder in self.holders]
        self._dicts += [*configs, *(d for layer in layers for d in (layer.scaling, layer.lora_variant))]
        self.take()

    def take(self) -> None:
        """Take over what the layers hold now."""
        self._empty = [d for d in self._dicts if not d]
        held = [d for d in self._dicts if d]
        self._snapshot = Snapshot([view for d in held for view in (d.keys(), d.values())])
        self._before = [(d, d.copy()) for d in held]
        scales = chain.from_iterable(scaling.values() for scaling in self._scalings)
        self._scales = [(scale, float(scale)) for scale in scales if isinstance(scale, Tensor)]  # written in place

    def differs(self) -> bool:
        return any(self._empty) or self._snapshot.differs() or self._are_written()

    def _are_written(self) -> bool:
        return any(float(scale) != before for scale, before in self._scales)

    def parts(self, adapter: str) -> list[nn.Module]:
        """Return the modules that belong to ``adapter``."""
        return [holder._modules[adapter] for holder in self.holders if adapter in holder._modules]

    def names(self) -> set[str]:
        """Return the adapters that the layers held when they were last taken over."""
        return set(chain.from_iterable(before for _, before in self._before))

    def came_and_went(self) -> tuple[set[str], set[str]] | None:
        """Return the adapters that are new and those that are gone; None if one that stayed has changed."""
        before, now = self.names(), set(chain.from_iterable(self._dicts))
        stayed, gone = before & now, before - now
        pairs = [*self._before, *((d, {}) for d in self._empty if d)]
        if gone:
            pairs = [(d, {name: own for name, own in held.items() if name in stayed}) for d, held in pairs]
        if self._are_written() or not all(_is_kept(d, held, stayed) for d, held in pairs):
            return None
        return now - before, gone


def _is_kept(now: dict, before: dict, stayed: set[str]) -> bool:
    if not all(map(is_, map(now.get, before), before.values())):
        return False
    return len(now) == len(before) or stayed.isdisjoint(now.keys() - before.keys())


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
        layers: those of ``layers`` that are PEFT's.
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
        self._model, self._adapted = model, [*modes, *layers.values(), *in_turn.values()]
        self.layers = {name: layer for name, (layer, _) in layers.items() if hasattr(layer, "lora_A")}
        switched = {name: layer for name, (layer, _) in in_turn.items() if hasattr(layer, "adapter_layer_names")}
        self._switched = self.layers | switched
        # What PEFT's layers hold for each adapter is apart from the rest, so that adapters can come and go.
        configs = {id(d): d for d in (vars(original).get(_CONFIGS) for original, _ in pairs) if isinstance(d, dict)}
        self._membership = _Membership(self.layers.values(), configs.values())
        parts = {name: self._membership.parts(name) for name in self._membership.names()}
        self._of_adapter = {name: _Modules.inside(own) for name, own in parts.items()}
        of_adapters = {id(m) for own in parts.values() for part in own for m in part.modules()}
        modules = [m for m in (*model.modules(), *around) if id(m) not in of_adapters]
        of_adapters = {id(_held_by_name(holder)) for holder in self._membership.holders}
        dicts = [d for m in modules for d in (*_contents(m), *_hooks(m)) if id(d) not in of_adapters]
        merged = [layer.merged_adapters for layer in self.layers.values()]
        # The modules inside PEFT's layers and around the model have no other attributes that matter, except new ones.
        copied = {id(original) for original, _ in pairs}
        others = [m for m in modules if id(m) not in copied]
        self._base = _Modules(modules, others, dicts, [*merged, *_insides(pairs)])
        self.structure = self._base.structure
        self._parts = list(chain.from_iterable(map(_PARTS, self.layers.values())))  # a new dict is none of the views
        self._pairs = list(pairs)
        self._taken_over = 0  # how often the copies got attributes that were set since
        self._attributes = Snapshot([vars(original).values() for original, _ in pairs])
        self._before = [dict(vars(original)) for original, _ in pairs]

    def disabled(self) -> str | None:
        """Return the name of a layer whose adapters are switched off, or None."""
        return next((name for name, layer in self._switched.items() if layer.disable_adapters), None)

    def is_as_built(self) -> bool:
        """Tell whether structure, hooks and what modules hold are unchanged; copy newly set plain attributes over."""
        if self._base.differ() or self._membership.differs():
            return False
        if any(modules.differ() for modules in self._of_adapter.values()):
            return False
        if not all(map(is_, chain.from_iterable(map(_PARTS, self.layers.values())), self._parts)):
            return False
        _follow_mode(self._adapted)
        return not self._attributes.differs() or self._take_over()

    def came_and_went(self) -> tuple[set[str], set[str]] | None:
        """Return the adapters that PEFT's layers have got and lost; None if another that they hold has changed.

        What else may have changed ``is_as_built`` still finds after ``take``.
        """
        return self._membership.came_and_went()

    def take(self, came: Iterable[str], gone: Iterable[str]) -> None:
        """Take over what ``came_and_went`` has found."""
        for name in gone:
            del self._of_adapter[name]
        self._of_adapter |= {name: _Modules.inside(self._membership.parts(name)) for name in came}
        self._membership.take()

    def follow_mode(self) -> None:
        """Take over only train() and eval()."""
        _follow_mode(self._adapted)
        _follow_mode(self._pairs)

    def stamp(self) -> tuple:
        """Return a stamp of what is taken over: attributes, train() and eval()."""
        return self._taken_over, [module.training for module in self._model.modules()]

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
        self._taken_over += any(name != "training" for _, _, name, _ in changes)
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
        if name not in OF_EVERY_MODULE and name != _CONFIGS
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
