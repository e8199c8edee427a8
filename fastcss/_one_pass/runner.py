"""Runs every adapter of a model in one pass over the model."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._fuse.fusion import Fusion, fuse_modules
from .call_arguments import check_adapters, check_group_size, check_per_adapter, check_route, check_task_dim
from .cuda_graphs import Captures
from .engine import Engine
from .fit_layers import fitted_again
from .inputs_outputs import Inputs, task_axis_second
from .model_copy import ModelCopy
from .passes import Passes
from .read_adapters import Adapters, check_global_hooks, read_peft
from .read_by_peft import ByPeft
from .read_folders import read_directories


class OnePass(nn.Module):
    """Runs a model once for all of its adapters: each output equals the model's with that adapter alone.

    The parts that no adapter has touched (everything before the first adapted layer, and every branch without one) are
    computed once for all adapters. The model is left as it is: the runner works on a copy of its structure that shares
    its tensors. Each call follows the model: new values of weights and adapters, however written; other parameters,
    buffers, modules, attributes, hooks, scales, dtypes and devices; train() and eval(). The runner refuses merged
    adapters and those switched off. It also refuses adapters that were added or removed, until ``refresh`` takes them
    over. Training through the runner reaches every adapter that requires gradients; by PEFT's default only the active
    one does. A forward hook sees one adapter's tensors at a time, so a model with the user's hooks runs as engine
    "replay".

    Adapters are LoRA on Linear, Conv1D, Conv2d or Embedding, and may differ in rank, alpha and the layers they cover.
    Modules that they were trained with whole (``modules_to_save``) and trainable tokens run in turn, a task at a time,
    inside of the pass. Any other kind of adapter in a model's layers (DoRA, LoHa, IA3, OFT, …), and other layers under
    LoRA, run by PEFT's own layers: the whole model then runs as engine "replay", with a warning.

    Args:
        model: a PEFT model, or any module with PEFT's layers in it.
        engine: "vmap" runs the adapters side by side under ``torch.vmap``; "replay" runs them in turn and repeats only
            what depends on the adapter, which works with any model; "auto" is "vmap", but falls back to "replay", with
            a warning, for a model that vmap refuses or that counts its calls. ``runner.engine`` says which of them
            runs.
        group_size: how many adapters run side by side under "vmap"; fewer take less memory. None means all of
            them on a GPU, and on a CPU as many as keep the tensors small enough for the C library and the caches.
        fuse: run the model's own modules on the fused ops, as ``fastcss.fuse`` does (here on the runner's copy). None
            fuses where that was measured to be faster, which is on a CPU.
        task_dim: 0, or 1 for outputs ``[B, T, …]``. Code that takes the first axis of an output for the batch, such as
            transformers' Trainer and accelerate's ``gather_for_metrics``, needs 1: it would cut the tasks otherwise.

    Attributes:
        model: the model, as it was given; its parameters and state_dict are the runner's.
        adapters: the adapters' names, in the order of the task axis.
        fusion: which modules run on the fused ops, a ``Fusion``, or None with ``fuse`` off.

    Raises:
        TypeError, ValueError: a layer or an adapter that cannot run in one pass, named in the message.

    Example:
        >>> runner = fastcss.one_pass(peft_model)
        >>> runner(pixel_values=image).last_hidden_state.shape  # [T, B, N, C]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: str = "auto",
        group_size: int | None = None,
        fuse: bool | None = None,
        task_dim: int = 0,
    ) -> None:
        super().__init__()
        self._begin(model, None, engine, group_size, fuse, task_dim)

    @classmethod
    def from_directories(
        cls,
        model: nn.Module,
        directories: Sequence[str | Path],
        *,
        names: Sequence[str] | None = None,
        engine: str = "auto",
        group_size: int | None = None,
        fuse: bool | None = None,
        task_dim: int = 0,
    ) -> OnePass:
        """Make a runner for a bare model and adapters saved by PEFT, without PEFT if they are plain LoRA.

        Each adapter runs as ``PeftModel.from_pretrained(model, folder)`` runs it. It runs in float32, whatever dtype it
        was saved in (float64 beside float64 layers). A PiSSA or OLoRA adapter gives what it gives in PEFT beside the
        reduced base layer, though here the model stays as it is. A layer with several names goes by its first name
        alone. Keys may contain the adapter's own name. A warning names the layers that a folder's config targets but
        the folder lacks, and the options that are not known. Modules saved whole have the dtype of the model's. If one
        of the adapters is of another kind, or has trainable tokens, PEFT reads them all, around a twin of the model
        that shares its tensors (while it reads, the model's weights are in memory twice).

        Args:
            model: the base model of the adapters.
            directories: PEFT adapter folders (``adapter_config.json`` and ``adapter_model.safetensors``).
            names: the adapters' names, by default the folders'.
            engine, group_size, fuse, task_dim: as for ``OnePass``.

        Raises:
            FileNotFoundError, TypeError, ValueError: a folder is incomplete, holds a pickle or weights that PEFT would
                leave out, belongs to another base model, or has PEFT change the base model; the message names the
                file or the layer.
            ImportError: the adapters want PEFT, and it is not installed.
        """
        return cls._made_of(model, read_directories(model, directories, names), engine, group_size, fuse, task_dim)

    @classmethod
    def _made_of(cls, model: nn.Module, adapters: Adapters | ByPeft | None, *options: Any) -> OnePass:
        """Make a runner for the adapters in ``model``, or for ``adapters`` if the model is bare."""
        runner = cls.__new__(cls)
        nn.Module.__init__(runner)
        runner._begin(model, adapters, *options)
        return runner

    def _begin(
        self,
        model: nn.Module,
        adapters: Adapters | ByPeft | None,
        engine: str,
        group_size: int | None,
        fuse: bool | None,
        task_dim: int,
    ) -> None:
        inside = next((name for name, module in model.named_modules() if isinstance(module, OnePass)), None)
        if inside is not None:
            raise TypeError(f"one_pass: {inside or 'the model'} is a runner itself; give the model that it runs")
        self.model, self._given = model, adapters
        self.training = model.training
        self.group_size, self.task_dim = check_group_size(group_size), check_task_dim(task_dim)
        self._asked, self._fuse = engine, fuse
        self._has_warned = False
        self.refresh()

    def refresh(self) -> None:
        """Take over the model as it is now, with adapters that were added, removed or reordered.

        Captured graphs are forgotten. Runners made by ``from_directories`` keep the adapters they have read.

        Raises:
            TypeError, ValueError: a layer or an adapter that cannot run in one pass, named in the message.
        """
        given = self._read()
        self._captures = Captures()
        self._take(*given)

    def _read(self) -> tuple[nn.Module, Adapters, list[tuple[nn.Module, nn.Module]]]:
        """Return the model with its adapters, and what of ``self.model`` it is a twin of."""
        if self._given is None:
            return *read_peft(self.model), []
        if isinstance(self._given, ByPeft):
            return self._given.built_on(self.model)
        self._given = fitted_again(self.model, self._given)
        return self.model, self._given, []

    def _take(self, base: nn.Module, adapters: Adapters, twins: list[tuple[nn.Module, nn.Module]]) -> None:
        inside = set(base.modules())
        around = [module for module in self.model.modules() if module not in inside]
        model_copy = ModelCopy(base, adapters, around, twins)
        fuse = model_copy.device.type == "cpu" if self._fuse is None else self._fuse
        # The adapted layers and the task rules already run linear layers on the faster GEMM.
        self.fusion: Fusion | None = fuse_modules(model_copy.model, linears=False) if fuse else None
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

    def __deepcopy__(self, memo: dict) -> OnePass:
        """Make another runner, without captured graphs, for a deep copy of the model."""
        made = self._made_of(*copy.deepcopy((self.model, self._given), memo), *self._options)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: object) -> tuple:
        return self._made_of, (self.model, self._given, *self._options)

    @property
    def _options(self) -> tuple:
        return self._asked, self.group_size, self._fuse, self.task_dim

    def __repr__(self) -> str:
        model = type(self._model_copy.model).__name__
        return f"OnePass({model}, adapters={list(self.adapters)}, engine={self.engine!r})"

    @property
    def engine(self) -> str:
        """Return the engine that runs the model in its present mode, "vmap" or "replay"."""
        if self._model_copy.by_peft and self._asked == "auto":
            return "replay"
        return self._engine.name(self._model_copy.training)

    def forward(
        self,
        *args: Any,
        adapters: Sequence[str] | None = None,
        route: Tensor | None = None,
        per_sample: Sequence[str] | None = None,
        per_adapter: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model with every adapter.

        Args:
            *args, **kwargs: what the model takes.
            adapters: names of the adapters to run, in the order wanted; by default all.
            route: int32 or int64 ``[B]``, instead of ``adapters``: for each sample of the batch, the index of its
                adapter in ``runner.adapters``, or -1 for the bare model. Each sample runs as a batch of one.
            per_sample: with ``route``, names of all inputs that hold one entry per sample: tensors with one row per
                sample (or several, one after the other), or lists of length B. None guesses: tensors and lists of
                length B. The guess is checked once for every kind of batch: the bare model must give the same for a
                sample alone and in its batch.
            per_adapter: keyword inputs of the model that differ between the adapters, such as each task's own classes:
                tensors with a leading axis ``[T, …]`` in the order of the adapters. Not with ``route``.

        Returns:
            The model's own output type. Every tensor in it has a leading axis of the adapters, ``[T, …]`` (an expanded
            view where the output does not depend on them); with ``task_dim=1`` that is the second axis. With ``route``
            there is no such axis, only the model's own; a number (a loss, say) becomes one per sample, ``[B]``.

        Raises:
            KeyError, TypeError, ValueError, IndexError: unknown adapters, a bad route, or a change of the model
                that cannot run in one pass; the message names it.
            RuntimeError: the model's adapters differ from the runner's, or are switched off; the message says what
                to do.
        """
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return torch.compiler.disable(self.forward)(
                *args, adapters=adapters, route=route, per_sample=per_sample, per_adapter=per_adapter, **kwargs
            )
        self._follow()
        if route is not None:
            route = check_route(route, adapters, per_adapter, self.adapters)
            self._warn_of_untrained(range(len(self.adapters)))
            return self._routed(route, Inputs(args, kwargs), per_sample)
        if per_sample is not None:
            raise ValueError("one_pass: per_sample says what route cuts, and there is no route")
        tasks = check_adapters(adapters, self.adapters)
        if per_adapter:
            kwargs["per_adapter"] = check_per_adapter(per_adapter, kwargs, len(tasks))
        self._warn_of_untrained(tasks)
        captured = self._captures.find(tasks, self._model_copy, args, kwargs)
        return captured() if captured else self._all_tasks(tasks, *args, **kwargs)

    def _routed(self, route: Tensor, inputs: Inputs, per_sample: Sequence[str] | None) -> Any:
        passes = self._passes
        if not len(route):
            return passes.bare(inputs)
        samples, axes = passes.samples(inputs, len(route), per_sample)
        in_turn = functools.partial(passes.routed_in_turn, route, samples, axes)
        stacked = samples.stacked()
        vmap = stacked and functools.partial(passes.routed, route, samples, axes, stacked)
        return self._engine.run(self._model_copy, inputs, vmap, in_turn, len(route))

    def capture(
        self,
        *args: Any,
        adapters: Sequence[str] | None = None,
        per_adapter: Mapping[str, Tensor] | None = None,
        fixed: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Capture a CUDA graph of the call with these inputs; later calls with inputs of their shapes replay it.

        Each set of shapes needs its own capture; other calls run as before. A graph holds inference only. Outputs of a
        replay are copies. A graph reads weights and adapters at their addresses, so it sees new values. If they have
        moved, or the model has changed, the next call captures anew.

        Args:
            *args, **kwargs: example inputs on the GPU; their values do not matter.
            adapters, per_adapter: as in a call.
            fixed: names of keyword inputs that later calls will pass as the very same, unchanged tensors (the text
                prompts, say): what depends on them and on the weights alone is computed now and left out of the graph.
                After a write to such weights that torch does not count (through ``.data`` or numpy), call ``refresh``
                and capture again.

        Raises:
            RuntimeError: the model or an input is not on a CUDA device, the model has hooks, or it does what no graph
                can hold.
        """
        self._follow()
        tasks = check_adapters(adapters, self.adapters)
        if per_adapter:
            kwargs["per_adapter"] = check_per_adapter(per_adapter, kwargs, len(tasks))
        call = functools.partial(self._all_tasks, tasks)
        self._captures.add(tasks, self._model_copy, call, fixed, args, kwargs)

    def _all_tasks(
        self, tasks: tuple[int, ...], *args: Any, per_adapter: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        inputs = Inputs(args, kwargs, per_adapter or {})
        passes, size = self._passes, self.group_size
        output = self._engine.run(
            self._model_copy,
            inputs,
            lambda: passes.side_by_side(tasks, size, inputs),
            lambda: passes.in_turn(tasks, inputs),
            len(tasks),
        )
        return output if self.task_dim == 0 else task_axis_second(output)

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


one_pass = OnePass
