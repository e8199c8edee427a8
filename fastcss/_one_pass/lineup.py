"""Says which adapters a runner runs, in which order and at which scales, and brings them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from .adapter_sets import joined, rescaled, selected
from .fit_layers import fitted_again
from .read_adapters import Adapters, read_peft
from .read_by_peft import ByPeft

Read = tuple[nn.Module, Adapters, list[tuple[nn.Module, nn.Module]]]


class BuiltOn(Protocol):
    """Holds adapters that are built on a model anew whenever it has changed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the adapters' names."""

    def built_on(self, model: nn.Module) -> Read:
        """Return the model with the adapters, and what of the user's ``model`` it is a twin of."""


@dataclasses.dataclass(frozen=True)
class Lineup:
    """Holds what a runner's user has chosen.

    Attributes:
        of_model: the model is PEFT's, and its own adapters run.
        folders: the adapters that were read from folders, or a pool's; None if there are none.
        names: all that run, in order; empty until they are first read.
        left_out: the model's own adapters that do not run.
        factors: adapters' names → by how much their scales are multiplied, where that is not 1.
    """

    of_model: bool
    folders: Adapters | BuiltOn | None = None
    names: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    factors: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_folders(cls, folders: Adapters | BuiltOn) -> Lineup:
        return cls(False, folders, folders.names)

    @property
    def of_folder(self) -> tuple[str, ...]:
        """Return the names of the adapters that were read from folders."""
        return () if self.folders is None else self.folders.names

    def all_of_model(self) -> Lineup:
        """Return the lineup with every adapter of the model, in the model's order, before those of folders."""
        return dataclasses.replace(self, names=(), left_out=frozenset()) if self.of_model else self

    def read(self, model: nn.Module) -> tuple[Lineup, Read]:
        """Return the model with the adapters in it, and the pairs if that is a twin; the lineup has all names then.

        Raises:
            TypeError, ValueError: a layer or an adapter that cannot run in one pass.
            RuntimeError: the model's adapters are others than this lineup's.
        """
        if self.folders is not None and not isinstance(self.folders, Adapters):
            twin, adapters, pairs = self.folders.built_on(model)
            return self, (twin, rescaled(adapters, self.factors), pairs)
        base, own = read_peft(model) if self.of_model else (model, None)
        folders = None if self.folders is None else fitted_again(base, self.folders)
        if own is None:
            return dataclasses.replace(self, folders=folders), (base, rescaled(folders, self.factors), [])
        read = dataclasses.replace(self, folders=folders)._with_names_of(own)
        adapters = own if folders is None else joined(own, folders)
        adapters = rescaled(selected(adapters, read.names, keep=True), self.factors)
        return read, (base, adapters, [])

    def _with_names_of(self, own: Adapters) -> Lineup:
        """Return the lineup with what it leaves open said by the model's ``own`` adapters."""
        if not self.names:
            twice = next((name for name in own.names if name in self.of_folder), None)
            if twice is not None:
                raise ValueError(
                    f"one_pass: the model has an adapter {twice!r}, and so has the runner from a folder; remove one, "
                    "or add the folder's with another name="
                )
            names = (*own.names, *self.of_folder)
            factors = {name: factor for name, factor in self.factors.items() if name in names}  # others are gone
            return dataclasses.replace(self, names=names, factors=factors)
        now = [name for name in own.names if name not in self.left_out]
        if set(now) != {name for name in self.names if name not in self.of_folder}:
            had = (name for name in self.names if name not in self.of_folder)
            raise RuntimeError(
                f"one_pass: the model's adapters are {', '.join(now)} now, and the runner has {', '.join(had)}; "
                "runner.refresh() takes them over, runner.add(name) or runner.remove(name) one of them"
            )
        return dataclasses.replace(self, left_out=self.left_out & set(own.names))

    # ------------------------------------------------------------------------------------- what its user changes in it

    def with_own(self, name: str) -> Lineup:
        """Return the lineup with the model's adapter ``name`` as the last one."""
        return dataclasses.replace(self, names=(*self.names, name), left_out=self.left_out - {name})

    def with_read(self, one: Adapters | ByPeft) -> Lineup:
        """Return the lineup with ``one``, the adapter of a folder, as the last one."""
        folders = one if self.folders is None else _put_together(self.folders, one)
        return dataclasses.replace(self, folders=folders, names=(*self.names, *one.names))

    def with_read_in_place(self, one: Adapters | ByPeft) -> Lineup:
        """Return the lineup with ``one``, the adapter of a folder, in place of the one of its name."""
        others = [name for name in self.of_folder if name not in one.names]
        folders = _selected(_put_together(_selected(self.folders, others), one), self.of_folder) if others else one
        return dataclasses.replace(self, folders=folders)

    def without(self, name: str) -> Lineup:
        names = tuple(other for other in self.names if other != name)
        factors = {other: factor for other, factor in self.factors.items() if other != name}
        lineup = dataclasses.replace(self, names=names, factors=factors)
        if name not in self.of_folder:
            return dataclasses.replace(lineup, left_out=self.left_out | {name})
        left = [other for other in self.of_folder if other != name]
        return dataclasses.replace(lineup, folders=_selected(self.folders, left) if left else None)

    def with_scale(self, name: str, factor: float) -> Lineup:
        return dataclasses.replace(self, factors={**self.factors, name: factor})


def _put_together(folders: Adapters | ByPeft, one: Adapters | ByPeft) -> Adapters | ByPeft:
    return folders.and_then(one) if isinstance(folders, ByPeft) else joined(folders, one)


def _selected(folders: Adapters | ByPeft, names: Sequence[str]) -> Adapters | ByPeft:
    return folders.of(names) if isinstance(folders, ByPeft) else selected(folders, names)
