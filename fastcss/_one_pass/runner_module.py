"""Holds what a runner is: a module around its user's model, made of it, following it, copied and pickled with it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .._fuse.fusion import Fusion, fuse_modules
from .call_arguments import check_group_size, check_task_dim
from .cuda_graphs import Captures
from .engine import Engine
from .fit_layers import fitted_again
from .model_copy import ModelCopy
from .passes import Passes
from .read_adapters import Adapters, check_global_hooks, read_peft

if TYPE_CHECKING:
    from typing_extensions import Self


class BuiltOn(Protocol):
    """Holds adapters that are built on a model anew whenever it has changed."""

    def built_on(self, model: nn.Module) -> tuple[nn.Module, Adapters, list[tuple[nn.Module, nn.Module]]]:
        """Return the model with the adapters, and what of the user's ``model`` it is a twin of."""


class RunnerModule(nn.Module):
    """Holds the part of a runner that does not depend on how it is called; ``OnePass`` is the whole."""

    adapters: tuple[str, ...]
    fusion: Fusion | None

    @classmethod
    def _made_of(cls, model: nn.Module, adapters: Adapters | BuiltOn | None, *options: Any) -> Self:
        """Make a runner for the adapters in ``model``, or for ``adapters`` if the model is bare."""
        runner = cls.__new__(cls)
        nn.Module.__init__(runner)
        runner._begin(model, adapters, *options)
        return runner

    def _begin(
        self,
        model: nn.Module,
        adapters: Adapters | BuiltOn | None,
        engine: str,
        group_size: int | None,
        fuse: bool | None,
        task_dim: int,
    ) -> None:
        inside = next((name for name, module in model.named_modules() if isinstance(module, RunnerModule)), None)
        if inside is not None:
            raise TypeError(f"one_pass: {inside or 'the model'} is a runner itself; give the model that it runs")
        self.model, self._given = model, adapters
        self.training = model.training
        self.group_size, self.task_dim = check_group_size(group_size), check_task_dim(task_dim)
        self._asked, self._fuse = engine, fuse
        self._has_warned = False
        self._renew()

    def _renew(self) -> None:
        """Take over the model as it is now; captured graphs are forgotten."""
        given = self._read()
        self._captures = Captures()
        self._take(*given)

    def _read(self) -> tuple[nn.Module, Adapters, list[tuple[nn.Module, nn.Module]]]:
        """Return the model with its adapters, and what of ``self.model`` it is a twin of."""
        if self._given is None:
            return *read_peft(self.model), []
        if not isinstance(self._given, Adapters):
            return self._given.built_on(self.model)
        self._given = fitted_again(self.model, self._given)
        return self.model, self._given, []

    def _take(self, base: nn.Module, adapters: Adapters, twins: list[tuple[nn.Module, nn.Module]]) -> None:
        inside = set(base.modules())
        around = [module for module in self.model.modules() if module not in inside]
        model_copy = ModelCopy(base, adapters, around, twins)
        fuse = model_copy.device.type == "cpu" if self._fuse is None else self._fuse
        # The adapted layers and the task rules already run linear layers on the faster GEMM.
        self.fusion = fuse_modules(model_copy.model, linears=False) if fuse else None
        self.adapters = adapters.names
        self._engine = Engine(self._asked)
        self._model_copy, self._passes = model_copy, Passes(model_copy)

    def _follow(self) -> None:
        """Bring the copy up to date with the model."""
        check_global_hooks()
        if self._model_copy.follow():
            return
        base, adapters, twins = self._read()
        if adapters.names != self.adapters:
            raise RuntimeError(
                f"one_pass: the model's adapters are {', '.join(adapters.names)} now, and the runner has "
                f"{', '.join(self.adapters)}; runner.refresh() takes them over"
            )
        self._take(base, adapters, twins)

    def _replicate_for_data_parallel(self):
        raise RuntimeError("one_pass: torch.nn.DataParallel cannot replicate a runner; use DistributedDataParallel")

    def __deepcopy__(self, memo: dict) -> Self:
        """Make another runner, without captured graphs, for a deep copy of the model."""
        made = self._made_of(*copy.deepcopy((self.model, self._given), memo), *self._options)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: object) -> tuple:
        return self._made_of, (self.model, self._given, *self._options)

    @property
    def _options(self) -> tuple:
        return self._asked, self.group_size, self._fuse, self.task_dim

    def _warn_of_untrained(self, tasks: Sequence[int]) -> None:
        if self._has_warned or not self._model_copy.training or not torch.is_grad_enabled():
            return
        untrained = [self.adapters[t] for t in self._model_copy.untrained(tasks)]
        if untrained:
            self._has_warned = True
            warnings.warn(
                f"one_pass: adapters {', '.join(untrained)} get no gradients, as PEFT lets the active adapter alone "
                f"require them; to train them as well: model.set_requires_grad({untrained})",
                stacklevel=5,
            )
