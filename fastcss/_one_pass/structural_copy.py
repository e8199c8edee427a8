"""Copies a model's modules, and shares everything else with the model.

Tensors and arrays are the model's own. So are objects that hooks and other functions belong to or hold: a hook of the
copy calls the user's own recorder, and reads what the model's forward has left in an object that both know.
Whatever refers to a module of the model (a bound method, a closure, a list) refers to the copy's module in the copy.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import operator
import types
import weakref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._dispatch.private_apis import compiled_from
from .._fuse.fused_module import Fused

_CONTAINERS = (list, tuple, set, frozenset, collections.deque, dict, collections.OrderedDict, collections.defaultdict)
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), slice, range, type, enum.Enum, types.ModuleType),
    *(types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
OF_EVERY_MODULE = vars(nn.Module()).keys()
_COPY_PROTOCOL = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")


class StructuralCopy:
    """Copies the modules under ``model``; ``of`` gives the copy's module for one of the model's."""

    def __init__(self, model: nn.Module) -> None:
        self._references: dict[int, object] = {}  # id of a module or function → what replaces it in the copy
        self._memo: dict[int, object] = {}  # the same for every object, in the form that copy.deepcopy takes
        self._held: list = []  # the originals, so that their ids stay their own
        self.pairs: list[tuple[nn.Module, nn.Module]] = []  # the modules, and the copies made of them
        for module in model.modules():
            self._share(*module._parameters.values(), *module._buffers.values())
            for name, value in vars(module).items():
                for function in value.values() if holds_hooks(name, value) else (value,):
                    if isinstance(function, _FUNCTIONS):
                        self._share(*_objects_of(function))
                    elif function is not value:  # a hook that is an object
                        self._share(function, getattr(function, "__self__", None))

    def replace(self, original: object, ours: object) -> None:
        """Use ``ours`` in place of the module or function ``original`` from now on."""
        self._references[id(original)] = self._memo[id(original)] = ours
        self._held.append(original)

    def of(self, module: nn.Module) -> nn.Module:
        """Return the copy of ``module``, with all that it holds."""
        return self._attribute(module)

    def _share(self, *values: object) -> None:
        values = [value for value in values if value is not None and not isinstance(value, nn.Module)]
        self._memo.update((id(value), value) for value in values)
        self._held += values

    # ------------------------------------------------------------------------------------------ what a module holds

    def _attribute(self, value: object) -> object:
        """Return what the copy holds where the model holds ``value``: its own containers and objects, shared arrays."""
        if isinstance(value, (*_PLAIN, Tensor, np.ndarray)) or is_configuration(value):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value)
        if type(value) in _CONTAINERS:
            return _rebuilt(value, self._attribute)
        if isinstance(value, (*_FUNCTIONS, weakref.ref)):
            return self.reference(value)
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # a lock, a file or a tensor with a history cannot be copied, and is shared
            self._share(value)
            return value

    def _module(self, module: nn.Module) -> nn.Module:
        """Copy ``module`` and the modules in it that have no copy yet.

        All copies are made before any is filled, because modules refer to each other.
        """
        made: list[tuple[nn.Module, nn.Module]] = []
        others: list[nn.Module] = []

        def begin(module: nn.Module) -> None:
            if id(module) in self._references:
                return
            original = compiled_from(module)
            if original is not None:
                begin(original)
                self.replace(module, self._references[id(original)])
                return
            if isinstance(module, torch.jit.ScriptModule):
                self.replace(module, module)  # its code is not Python's, and it holds no adapters
                return
            if _has_own_copy(module):
                others.append(module)
            else:
                made.append((module, type(module).__new__(type(module))))
                self.replace(*made[-1])
            for child in module.children():
                begin(child)

        begin(module)
        for other in reversed(others):
            if id(other) not in self._references:
                self.replace(other, copy.deepcopy(other, self._memo))
                self.pairs.append((other, self._references[id(other)]))
        for original, ours in made:
            for name, value in list(vars(original).items()):
                vars(ours)[name] = self.hooks(value) if holds_hooks(name, value) else self._attribute(value)
        self.pairs += made
        return self._references[id(module)]

    def hooks(self, hooks: dict) -> dict:
        """Return a dict of hooks for the copy; the hooks themselves stay the user's own."""
        made = copy.copy(hooks)
        if hooks:
            made.update((key, self.reference(hook)) for key, hook in hooks.items())
        return made

    # ----------------------------------------------------------------------------------------- what refers to a module

    def reference(self, value: object) -> object:
        """Return ``value`` itself, or its copy if it refers to a module that was copied."""
        if id(value) in self._references:
            return self._references[id(value)]
        if isinstance(value, types.MethodType):
            return self._method(value)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            ours = tuple(map(self.reference, parts))
            if all(map(operator.is_, ours, parts)):
                return value
            made = type(value)(ours[0], *ours[1], **ours[2])
            vars(made).update({name: self.reference(held) for name, held in vars(value).items()})
            return made
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, weakref.ref):
            referent = value()
            ours = self.reference(referent)
            return value if ours is referent else weakref.ref(ours)
        if type(value) in _CONTAINERS and value:
            members = [*value.values()] if isinstance(value, dict) else list(value)
            same = all(map(operator.is_, map(self.reference, members), members))
            return value if same else _rebuilt(value, self.reference)
        return value

    def _method(self, method: types.MethodType) -> object:
        owner, function = self.reference(method.__self__), self.reference(method.__func__)
        if owner is method.__self__:
            return method
        name = getattr(function, "__name__", "")  # a partial, as torchao binds to its layers, has no name
        if getattr(type(method.__self__), name, None) is not method.__func__:
            return types.MethodType(function, owner)
        try:
            return types.MethodType(getattr(type(owner), function.__name__), owner)  # the owner's own method
        except AttributeError:
            name = f"{type(method.__self__).__name__}.{function.__name__}"
            raise TypeError(f"one_pass: a hook or a replaced forward calls {name}, which one pass has not") from None

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return ``function`` with a closure, defaults and attributes that refer to the copy."""
        closure, held = function.__closure__ or (), held_by(function)
        self.replace(function, function)  # ends the recursion if the function refers to itself
        if all(map(operator.is_, map(self.reference, held), held)):
            return function
        cells = tuple(types.CellType() for _ in closure)
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self.replace(function, made)
        for ours, cell in zip(cells, closure, strict=True):
            if _is_set(cell):
                ours.cell_contents = self.reference(cell.cell_contents)
        for name in ("__defaults__", "__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(made, name, self.reference(getattr(function, name)))
        vars(made).update({name: self.reference(value) for name, value in vars(function).items()})
        return made


def _objects_of(function: object) -> list:
    """Return the objects and containers that a function belongs to or holds, directly or through others.

    An object that holds a module is left out, unless the function belongs to it: the copy has its own of both.
    """
    found, seen, todo = [], set(), [function]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, (*_PLAIN, Tensor, nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            found += [] if isinstance(value.__self__, (*_PLAIN, *_FUNCTIONS)) else [value.__self__]
            todo.append(value.__func__)
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
        elif isinstance(value, types.FunctionType):
            todo += held_by(value)
        elif type(value) in _CONTAINERS:
            todo += value.values() if isinstance(value, dict) else value
            found += [] if _is_rebuilt(value) else [value]
        elif not any(isinstance(held, nn.Module) for held in getattr(value, "__dict__", {}).values()):
            found.append(value)
    return found


def _is_rebuilt(value: object) -> bool:
    """Tell whether ``value`` may refer to a module, so that the copy needs its own container."""
    if type(value) in _CONTAINERS:
        return any(map(_is_rebuilt, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (nn.Module, *_FUNCTIONS))


def held_by(function: types.FunctionType) -> list:
    """Return what ``function`` reads beside its arguments and its module: closure, defaults and attributes."""
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
    return [*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the cell is still empty
        return False


def _rebuilt(container: object, change) -> object:
    """Return a container like this one, with ``change`` applied to each member."""
    if isinstance(container, dict):
        made = copy.copy(container)
        made.clear()
        made.update((key, change(value)) for key, value in container.items())
        return made
    bound = (container.maxlen,) if isinstance(container, collections.deque) else ()
    return type(container)(map(change, container), *bound)


def holds_hooks(name: str, value: object) -> bool:
    """Tell whether the attribute ``name`` of a module is a dict of hooks, or of facts about hooks."""
    return isinstance(value, dict) and name.startswith("_") and "_hooks" in name


def is_configuration(value: object) -> bool:
    """Tell whether ``value`` is transformers' configuration, which is shared: the copy reads the model's settings."""
    return any(cls.__name__ in ("PretrainedConfig", "PreTrainedConfig") for cls in type(value).__mro__)


def _has_own_copy(module: nn.Module) -> bool:
    """Tell whether the class of ``module`` defines how it is copied (a compiled module, an fx graph)."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return False
        if cls is Fused or (cls is type(module) and parametrize.is_parametrized(module)):
            continue  # their copy protocol only says how a class made at run time is pickled
        if any(name in vars(cls) for name in _COPY_PROTOCOL):
            return True
    return False
