"""Runs every adapter of a model in one pass over the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .call_arguments import check_adapters, check_per_adapter, check_route
from .coming_adapters import ComingAdapters
from .inputs_outputs import Inputs, task_axis_second
from .lineup import Lineup
from .read_folders import read_directories
from .traced import call_traced
from .training import set_requires_grad


class OnePass(ComingAdapters):
    """Runs a model once for all of its adapters: each output equals the model's with that adapter alone.

    The parts that no adapter has touched (everything before the first adapted layer, and every branch without one) are
    computed once for all adapters. The model is left as it is: the runner works on a copy of its structure that shares
    its tensors. Each call follows the model: new values of weights and adapters, however written; other parameters,
    buffers, modules, attributes, hooks, scales, dtypes and devices; train() and eval(). The runner refuses merged
    adapters and those switched off. It also refuses adapters that the model has got or lost, until ``add``, ``remove``
    or ``refresh`` takes them over. Training through the runner reaches every adapter that requires gradients; by PEFT's
    default only the active one does, and ``set_requires_grad`` lets all. A forward hook sees one adapter's tensors at a
    time, so a model with the user's hooks runs as engine "replay".

    Adapters are LoRA or DoRA on Linear, Conv1D, Conv2d or Embedding, and may differ in rank, alpha and the layers they
    cover. All else that adapters have in a model's layers runs in turn, a task at a time, inside of the pass: modules
    that they were trained with whole (``modules_to_save``), trainable tokens, every other kind (LoHa, VeRA, IA3, OFT,
    …, several in one model) and other layers under LoRA (MultiheadAttention, Conv1d, Conv3d, quantised ones), by
    PEFT's own layers. Calls of a runner with such layers from several threads wait for each other.

    ``torch.export`` and ``torch.compile`` with fullgraph=True trace a call, but none with ``route``, nor engine "vmap".
    A compiled graph reads the parameters as they are; a call of it raises if something else of the model has changed.
    Without fullgraph=True a runner stays out of the graphs.

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
        model: the model, as it was given; its parameters and state_dict are the runner's, under "model.".
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
        self._begin(model, Lineup(of_model=True), engine, group_size, fuse, task_dim)

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
        the folder lacks, and the options that are not known. Modules saved whole, and biases of the base model that
        an adapter was trained with, are its own, in the dtype of the model's. If one of the adapters is neither LoRA
        nor DoRA, is on other layers, or has trainable tokens, PEFT reads them all, around a twin of the model that
        shares its tensors (while it reads, the model's weights are in memory twice); over quantised layers it does not.

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
        lineup = Lineup.of_folders(read_directories(model, directories, names))
        return cls._made_of(model, lineup, engine, group_size, fuse, task_dim)

    def refresh(self) -> None:
        """Take over the model as it is now, with adapters that were added, removed or reordered.

        Captured graphs are forgotten. Runners made by ``from_directories`` keep the adapters they have read.

        Raises:
            TypeError, ValueError: a layer or an adapter that cannot run in one pass, named in the message.
        """
        with self._calls.change():
            self._renew(self._lineup.all_of_model())

    def set_requires_grad(self, adapters: str | Sequence[str] | None = None, *, requires_grad: bool = True) -> None:
        """Let adapters require gradients, with their saved modules and trainable tokens, or no longer.

        PEFT lets only the active adapter require them: ``model.set_adapter`` undoes this.

        Args:
            adapters: names of adapters; by default all.
            requires_grad: whether they require gradients. Other adapters and the base model stay as they are.

        Raises:
            KeyError, ValueError: unknown adapters.
            TypeError: adapters that were read from folders, and are no parameters.
        """
        set_requires_grad(self.model, self.adapters, self._lineup.of_folder, adapters, requires_grad)

    def __repr__(self) -> str:
        model = type(self._model_copy.model).__name__
        return f"OnePass({model}, adapters={list(self.adapters)}, engine={self.engine!r})"

    @property
    def engine(self) -> str:
        """Return the engine that runs the model in its present mode, "vmap" or "replay"."""
        return self._engine.name(self._model_copy.training)

    def forward(
        self,
        *args: Any,
        adapters: Sequence[str] | None = None,
        route: Tensor | Sequence[str | None] | None = None,
        per_sample: Sequence[str] | None = None,
        per_adapter: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model with every adapter.

        Args:
            *args, **kwargs: what the model takes.
            adapters: names of the adapters to run, in the order wanted; by default all.
            route: instead of ``adapters``, the name of its adapter for each of the B samples of the batch, or None for
                the bare model: ``["cat", None, "dog"]``. Or int32 or int64 ``[B]``: places in ``runner.adapters``,
                and -1. Each sample runs as a batch of one.
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
        if torch.compiler.is_compiling() and not self._is_of_trace:
            options = {"adapters": adapters, "route": route, "per_sample": per_sample, "per_adapter": per_adapter}
            return call_traced(self, args, {**kwargs, **options})
        with self._calls.call():
            self._follow()
            if route is not None:
                route = check_route(route, adapters, per_adapter, self.adapters, self._model_copy.device)
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
        with self._calls.call():
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


one_pass = OnePass
