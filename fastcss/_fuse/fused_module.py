"""Defines what fused modules have in common: a class in front of the module's own, and the check that it fits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import ClassVar

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused:
    """Stands before a module's own class, and replaces its ``forward``.

    Attributes:
        op: the name of the op that the module then runs on.
        classes: full names of the classes whose arithmetic ``forward`` has.
        parts: dotted names of what ``forward`` takes from the module.
        bypassed: inner modules whose ``forward`` is no longer called.
        gives_weights: the module sees a request for attention weights, and lets its own class return them.
        made_of: the two classes that a class made by ``fused_class`` is made of.
    """

    op: ClassVar[str]
    classes: ClassVar[frozenset[str]]
    parts: ClassVar[tuple[str, ...]] = ()
    bypassed: ClassVar[tuple[str, ...]] = ()
    gives_weights: ClassVar[bool] = False
    made_of: ClassVar[tuple[type[Fused], type[nn.Module]]]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Return why ``module``, of one of ``classes``, cannot get this class, or None if it can."""
        if "forward" in vars(module):
            return "its forward was set on the instance"
        for name in cls.parts:
            try:
                attrgetter(name)(module)
            except AttributeError:
                package = type(module).__module__.partition(".")[0]
                return f"it has no {name}: another release of {package} than this is written for"
        for name in cls.bypassed:
            inner = attrgetter(name)(module)
            if type(inner).__module__ != type(module).__module__:
                return f"its {name} is a {full_name(type(inner))}"
            if "forward" in vars(inner):
                return f"the forward of its {name} was set on the instance, and would not run"
            if _has_hooks(inner):
                return f"its {name} has hooks, which would not run"
        return None

    def is_watched(self) -> bool:
        """Tell whether a bypassed module has got hooks since the fusion."""
        return any(_has_hooks(self.get_submodule(name)) for name in self.bypassed)

    def __reduce_ex__(self, protocol):
        # The class was made at run time, so copies and pickles name the two classes that it is made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, self.made_of, *state


@functools.cache
def fused_class(fused: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of ``original`` with the forward of ``fused``."""
    members = {"__module__": fused.__module__, "made_of": (fused, original)}
    return type(f"Fused{original.__name__}", (fused, original), members)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module``, or the class that it had before it was fused."""
    return module.made_of[1] if isinstance(module, Fused) else type(module)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_made_by(hook: Callable, packages: tuple[str, ...]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(packages)


def _has_hooks(module: nn.Module) -> bool:
    """Tell whether ``module`` has hooks other than those by which transformers collects attention weights: it puts them
    on every layer at the first request for any output, and the weights themselves are refused to be returned."""
    return any(not is_made_by(hook, ("transformers.",)) for hooks in HOOKS for hook in getattr(module, hooks).values())


def _new(fused: type[Fused], original: type[nn.Module]) -> nn.Module:
    cls = fused_class(fused, original)
    return cls.__new__(cls)
