"""Finds values of one adapter's pass that a model keeps (a cache of features, say) and reuses in another adapter's."""

from __future__ import annotations

import collections
import types
import weakref
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from .structural_copy import held_by

# A tensor that depends on adapters has this attribute: (the name of a model's copy, its adapters).
_ORIGIN = "_one_pass_origin"
_CONTAINERS = (list, tuple, dict, set, collections.deque)
MOST_SEARCHED = 100_000  # objects


class KeptError(RuntimeError):
    """Says that a pass meets ``tensor``, a value of another adapter's pass."""

    def __init__(self, message: str, tensor: Tensor) -> None:
        super().__init__(message)
        self.tensor = tensor

    def named(self, place: str | None, model: str) -> RuntimeError:
        """Return the error for the caller, which names the place where the model keeps the value."""
        where = f", which it keeps in {place!r}" if place else ""
        return RuntimeError(
            f"one_pass: {model} uses a value of one adapter's pass in that of another{where} ({self}); "
            "no adapter's output would be its own, so switch off what the model remembers from call to call"
        )


class KeepsError(RuntimeError):
    """Says that a run under vmap left ``tensors`` of its tasks in the model."""

    def __init__(self, place: str, tensors: list[Tensor]) -> None:
        super().__init__(f"the model keeps a value that differs between the tasks after its call, in {place!r}")
        self.tensors = tensors


def mark(tensor: Tensor, origin: tuple) -> Tensor:
    """Mark ``tensor`` as dependent on the adapter of ``origin``, and return it."""
    setattr(tensor, _ORIGIN, origin)
    return tensor


def origin_of(tensor: Tensor) -> tuple | None:
    """Return the origin that ``tensor`` is marked with, or None."""
    return getattr(tensor, _ORIGIN, None)


def unmark(tensor: Tensor) -> None:
    """Remove the mark of ``tensor``: it now is an ordinary input, though a hook may have kept it from some pass."""
    if getattr(tensor, _ORIGIN, None) is not None:
        delattr(tensor, _ORIGIN)


class OneTask:
    """Follows what depends on the adapter through the calls of one adapter's pass.

    Args:
        origin: the origin of this pass (``Slots.origin``); it has no adapters for the bare model.
        owned: ids of the tensors that outlive the call, and may carry values from pass to pass.
    """

    def __init__(self, origin: tuple, owned: set[int]) -> None:
        self._origin, self._owned = origin, owned

    def depends(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        """Tell whether a call depends on the adapter; raise if it depends on another pass's adapter."""
        found = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, (list, tuple)):
                found |= self.depends(func, tuple(value), {})
                continue
            tensor, origin = value, getattr(value, _ORIGIN, None)
            if origin is None:
                continue
            if origin != self._origin and origin[0] == self._origin[0]:
                raise KeptError(f"{getattr(func, '__name__', func)} of a tensor {list(tensor.shape)}", tensor)
            found = True
        return found

    def follow(self, result: object) -> None:
        """Mark the result of a call that depends on the adapter."""
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, Tensor) and id(value) not in self._owned:
                mark(value, self._origin)


class Mapped:
    """Knows which values with a hidden task axis are still alive after a pass under vmap."""

    def __init__(self) -> None:
        self._made: list[weakref.ref] = []

    def add(self, tensor: Tensor) -> None:
        self._made.append(weakref.ref(tensor))

    def alive(self, returned: Iterable[Tensor]) -> list[Tensor]:
        """Return the living values that the model did not return."""
        known = {id(tensor) for tensor in returned}
        return [t for t in (ref() for ref in self._made) if t is not None and id(t) not in known]


def where_kept(model: nn.Module, tensors: Iterable[Tensor]) -> str | None:
    """Return the module and attribute under which ``model`` holds one of ``tensors``, or None."""
    wanted = {id(tensor) for tensor in tensors}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules") and _holds(value, wanted, seen):
                return ".".join(filter(None, (path, name)))
    return None


def _holds(value: object, wanted: set[int], seen: set[int]) -> bool:
    todo = [value]
    while todo and len(seen) < MOST_SEARCHED:
        value = todo.pop()
        if id(value) in wanted:
            return True
        if id(value) not in seen and not isinstance(value, (Tensor, nn.Module)):
            seen.add(id(value))
            todo.extend(_inside(value))
    return False


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, _CONTAINERS):
        yield from value
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from held_by(value)
    elif not isinstance(value, (type, types.ModuleType)):
        yield from getattr(value, "__dict__", {}).values()
