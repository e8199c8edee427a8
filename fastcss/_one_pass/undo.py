"""Puts a model and its inputs back after a run that failed half-way."""

from __future__ import annotations

import collections
import copy
import threading
import types
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .changes import Snapshot
from .structural_copy import OF_EVERY_MODULE, is_configuration
from .task_rules import is_mapped

_CONTAINERS = (list, dict, set, collections.deque)
_MISSING = object()
_COMPARABLE = (bool, int, float, str, Tensor)
_NOT_ENTERED = (
    *(bool, int, float, complex, str, bytes, type(None), type, Tensor, nn.Module, torch.dtype, torch.device),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, threading.local),
)


class Attributes:
    """Holds the attributes, buffers and hooks of ``modules``, and searches them again only if one was set since.

    A model may put hooks on its own modules in its first call, as those of transformers do that return what is in them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._look()

    def _look(self) -> None:
        held = [d for m in self._modules for d in (vars(m), m._buffers, m._forward_hooks, m._forward_pre_hooks)]
        dicts = [(d, d.copy()) for d in held]
        own = [a[name] for a in map(vars, self._modules) for name in a.keys() - OF_EVERY_MODULE]
        own = [value for value in own if isinstance(value, Tensor) or not isinstance(value, _NOT_ENTERED)]
        self._empty = [d for d in held if not d]
        self._seen = Snapshot([view for d in held if d for view in (d.keys(), d.values())]), dicts, own

    def now(self) -> tuple[list[tuple[dict, dict]], list]:
        """Return each dict of these with a copy of it, and the values that may hold more."""
        if any(self._empty) or self._seen[0].differs():
            self._look()
        _, dicts, own = self._seen
        return dicts, list(own)


class Undo:
    """Keeps the state of modules and of ``tensors`` (buffers, the inputs) as it is when a run begins.

    It keeps the values of the ``attributes`` and the hooks, and the entries of lists, dicts, sets and objects in
    attributes. ``tensors``, and the tensors in attributes that are not parameters, are copied at once if earlier runs
    wrote them (``known`` has their ids; None means all). The others are copied when ``before_write`` announces a write.
    """

    def __init__(self, attributes: Attributes, tensors: Sequence[Tensor], known: set[int] | None) -> None:
        self._attributes, own = attributes.now()
        self._contents: list[tuple[object, object]] = []
        seen: set[int] = set()
        for value in own:  # the list grows by what is in the values
            if isinstance(value, _NOT_ENTERED) or id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, (*_CONTAINERS, tuple)):
                value = None if is_configuration(value) else getattr(value, "__dict__", None)
            if value:
                own += value.values() if isinstance(value, dict) else value
            if isinstance(value, _CONTAINERS):
                self._contents.append((value, copy.copy(value)))
        held = (value for value in own if isinstance(value, Tensor) and not isinstance(value, nn.Parameter))
        held = (value for value in held if not is_mapped(value))  # those were left by a run under vmap, and are useless
        tensors = [_whole(tensor) for tensor in (*tensors, *held) if not tensor.is_inference()]
        self._versions = {id(t): (t, t._version) for t in tensors}
        self._values: dict[int, Tensor] = {}
        for tensor in tensors:
            if known is None or id(tensor) in known:
                self.before_write(tensor)

    def before_write(self, tensor: Tensor) -> None:
        """Copy ``tensor``, or the tensor it is a view of, which is about to be written."""
        tensor = _whole(tensor)
        if id(tensor) in self._versions and id(tensor) not in self._values:
            self._values[id(tensor)] = tensor.detach().clone()

    def written(self) -> list[Tensor]:
        """Return the tensors that have been written since."""
        return [tensor for tensor, version in self._versions.values() if tensor._version != version]

    def changes(self) -> list[tuple]:
        """Return what was written or set since, with the new values; ``same_changes`` compares two such lists."""
        found = [(id(t), t.detach().clone()) for t in self.written()]
        for place, (now, before) in enumerate(self._attributes):
            found += _set_since((place, "attribute"), now, before)
        for place, (now, before) in enumerate(self._contents):
            if len(now) != len(before):
                found.append((place, len(now)))
            if isinstance(now, dict):
                found += _set_since(place, now, before)
            elif isinstance(now, list):
                found += _set_since(place, dict(enumerate(now)), dict(enumerate(before)))
        return found

    def __call__(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: a tensor was written without an announcement.
        """
        for now, before in self._attributes:
            restore(now, before)
        for now, before in self._contents:
            now.clear()
            (now.extend if isinstance(now, (list, collections.deque)) else now.update)(before)
        lost = [tensor for tensor in self.written() if id(tensor) not in self._values]
        with torch.no_grad():
            for tensor in self.written():
                if id(tensor) in self._values:
                    tensor.copy_(self._values[id(tensor)])
        if lost:
            raise RuntimeError(
                f"one_pass: a run under vmap failed after it had written a tensor of the model or an input, "
                f"{list(lost[0].shape)}, which cannot be put back; build the runner with engine='replay'"
            )


def _set_since(place: object, now: dict, before: dict) -> list[tuple]:
    """Return the plain values and tensors in ``now`` that are not in ``before``."""
    new = [(key, value) for key, value in now.items() if value is not before.get(key, _MISSING)]
    return [((place, key), value) for key, value in new if isinstance(value, _COMPARABLE)]


def same_changes(some: list[tuple], others: list[tuple]) -> bool:
    """Tell whether two runs from the same state have led to the same state."""
    return len(some) == len(others) and all(
        one == other and _same(a, b) for (one, a), (other, b) in zip(some, others, strict=True)
    )


def _same(a: object, b: object) -> bool:
    if is_mapped(a) or is_mapped(b):  # such a value is each adapter's own, and the next call sets it anew
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, equal_nan=True)
    return type(a) is type(b) and a == b


def _whole(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or the tensor that it is a view of: both count the same writes."""
    return tensor._base if tensor._is_view() else tensor


def restore(now: dict, before: dict) -> None:
    """Give the dict ``now`` the entries of ``before``."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name) is not value:
            now[name] = value
