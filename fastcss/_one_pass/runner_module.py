"""Holds what a runner is: a module around its user's model, made of it, following it, copied and pickled with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._fuse.fusion import Fusion, fuse_modules
from .call_arguments import check_group_size, check_task_dim
from .calls import Calls
from .cuda_graphs import Captures
from .engine import Engine
from .lineup import Lineup, Read
from .model_copy import ModelCopy
from .named_model import NamedModel
from .passes import Passes
from .read_adapters import Adapters, check_global_hooks
from .signatures import unsigned, with_signature_of
from .traced import Compiled, place_of
from .training import warn_of_untrained

if TYPE_CHECKING:
    from typing_extensions import Self


class RunnerModule(nn.Module):
    """Holds the part of a runner that does not depend on how it is called; ``OnePass`` is the whole."""

    adapters: tuple[str, ...]
    fusion: Fusion | None

    @classmethod
    def _made_of(cls, model: nn.Module, lineup: Lineup, *options: Any) -> Self:
        """Make a runner for ``model`` with the adapters of ``lineup``."""
        runner = cls.__new__(cls)
        nn.Module.__init__(runner)
        runner._begin(model, lineup, *options)
        return runner

    def _begin(
        self,
        model: nn.Module,
        lineup: Lineup,
        engine: str,
        group_size: int | None,
        fuse: bool | None,
        task_dim: int,
    ) -> None:
        inside = next((name for name, module in model.named_modules() if isinstance(module, RunnerModule)), None)
        if inside is not None:
            raise TypeError(f"one_pass: {inside or 'the model'} is a runner itself; give the model that it runs")
        self.model, self.training = model, model.training
        self._calls = Calls()
        self._named: tuple[ModelCopy, NamedModel] | None = None  # lists the names of the model for folders to come
        self.group_size, self.task_dim = check_group_size(group_size), check_task_dim(task_dim)
        self._asked, self._fuse = engine, fuse
        self._has_warned = False
        self._is_of_trace = False  # a trace has built it for its one call
        self._place, self._renewed, self._compared = place_of(self), 0, torch.zeros(())
        self._compiled: list[Compiled] = []
        self._renew(lineup)

    def _renew(self, lineup: Lineup) -> None:
        """Take over the model as it is now, with the adapters of ``lineup``; captured graphs are forgotten."""
        self._take(*lineup.read(self.model))
        self._captures = Captures()

    def _take(self, lineup: Lineup, read: Read) -> None:
        base, adapters, twins = read
        inside = set(base.modules())
        around = [module for module in self.model.modules() if module not in inside]
        model_copy = ModelCopy(base, adapters, around, twins)
        _check_scales(lineup.factors, adapters, model_copy)
        fuse = model_copy.device.type == "cpu" if self._fuse is None else self._fuse
        # The adapted layers and the task rules already run linear layers on the faster GEMM.
        self.fusion = fuse_modules(model_copy.model, linears=False) if fuse else None
        self._lineup, self._adapters, self.adapters = lineup, adapters, adapters.names
        self._engine = Engine(self._asked)
        self._model_copy, self._passes = model_copy, Passes(model_copy)
        self._renewed += 1
        self.__class__ = with_signature_of(type(self), model_copy.model)

    def _follow(self, in_trace: bool = True) -> None:
        """Bring the copy up to date with the model, also while torch traces if ``in_trace`` is False."""
        check_global_hooks()
        if self._model_copy.follow() if in_trace else self._model_copy.is_current():
            return
        self._take(*self._lineup.read(self.model))

    def called_in_trace(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Make a call in a trace, whose stand-ins are the model's parameters."""
        self._is_of_trace = True
        try:
            return self(*args, **kwargs)
        finally:
            self._is_of_trace = False

    def _replicate_for_data_parallel(self):
        raise RuntimeError("one_pass: torch.nn.DataParallel cannot replicate a runner; use DistributedDataParallel")

    def __deepcopy__(self, memo: dict) -> Self:
        """Make another runner, without captured graphs, for a deep copy of the model."""
        made = self._made_of(*copy.deepcopy((self.model, self._lineup), memo), *self._options)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: object) -> tuple:
        return unsigned(type(self))._made_of, (self.model, self._lineup, *self._options)

    @property
    def _options(self) -> tuple:
        return self._asked, self.group_size, self._fuse, self.task_dim

    def _warn_of_untrained(self, tasks: Sequence[int]) -> None:
        self._has_warned = self._has_warned or warn_of_untrained(self._model_copy, self.adapters, tasks)


def _check_scales(factors: Mapping[str, float], adapters: Adapters, model_copy: ModelCopy) -> None:
    """Raise if a factor that ``set_scale`` was given would not reach all layers of its adapter."""
    name = next((name for name in adapters.names if factors.get(name, 1.0) != 1.0), None)
    if name is not None and model_copy.by_peft:
        raise TypeError(
            f"one_pass: {model_copy.by_peft} now, which PEFT's own layer runs, and runner.set_scale({name!r}, "
            f"{factors[name]}) does not reach it; runner.set_scale({name!r}, 1) before that adapter comes, or once it "
            "is gone again, and set the scale in the model's layers"
        )
