"""Runs a model's copy for many adapters, or for samples that each have their own adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .group_size import Widest, group_size
from .inputs_outputs import Inputs, Output, join
from .leaked_values import KeepsError, KeptError, Mapped, OneTask, mark, unmark, where_kept
from .model_copy import ModelCopy
from .samples import Axes, Samples
from .shared_work import SharedWork
from .task_rules import TaskRules, is_mapped

MOST_KINDS = 256  # kinds of batches that are remembered, with the way their outputs are put together


class Passes:
    """Runs passes over a model's copy."""

    def __init__(self, model_copy: ModelCopy) -> None:
        self._copy, self._model, self._slots = model_copy, model_copy.model, model_copy.slots
        self._axes: dict[tuple, Axes] = {}  # the keys are training mode and the kind of batch
        self._widest: dict[tuple, int] = {}  # input shapes → bytes of the widest tensor of one task

    def forget_adapters(self) -> None:
        """Forget what was measured with adapters that are others now; where outputs have their batch stays."""
        self._widest.clear()

    # --------------------------------------------------------------------------------- every task on the same input

    def side_by_side(self, tasks: tuple[int, ...], size: int | None, inputs: Inputs) -> object:
        """Run groups of ``size`` tasks under vmap; the groups share what no adapter touches.

        None lets this method choose the size; on a CPU the first task of the first call then runs alone, so that its
        memory can be measured.
        """
        size = size or self._known_size(len(tasks), inputs)
        outputs = []
        with self._sharing(size != len(tasks), inputs) as shared:
            done = 0
            if size is None:
                widest, done = Widest(), 1
                outputs.append(self._group(tasks[:1], inputs.of(slice(1)), shared, widest))
                if len(self._widest) > MOST_KINDS:
                    self._widest.clear()
                self._widest[inputs.shapes] = widest.bytes
                size = self._known_size(len(tasks) - 1, inputs)
            for start in range(done, len(tasks), size):
                group = slice(start, start + size)
                outputs.append(self._group(tasks[group], inputs.of(group), shared))
        return join(outputs).expanded()

    def in_turn(self, tasks: tuple[int, ...], inputs: Inputs) -> object:
        """Run one task after the other; the later ones take over what no adapter touches."""
        with self._sharing(len(tasks) > 1, inputs) as shared:
            singles = [self._single((task,), inputs.of(slice(i, i + 1)), shared) for i, task in enumerate(tasks)]
            return join(singles).expanded()

    def _known_size(self, tasks: int, inputs: Inputs) -> int | None:
        """Return how many tasks to run side by side, or None if that has to be measured first."""
        if tasks == 1 or self._copy.device.type != "cpu" or self._copy.training:
            return tasks
        widest = self._widest.get(inputs.shapes)
        return None if widest is None else group_size(tasks, widest)

    # ------------------------------------------------------------------------------------ an adapter for each sample

    def samples(self, inputs: Inputs, size: int, names: Sequence[str] | None) -> tuple[Samples, Axes | None]:
        """Cut the batch into samples, and return with them how their outputs are joined (None for a batch of one)."""
        samples = Samples(self._model, inputs, size, names)
        if size == 1:
            return samples, None
        key = self._copy.training, samples.kind
        if key not in self._axes:
            if len(self._axes) > MOST_KINDS:
                self._axes.clear()
            self._axes[key] = self._measured(samples)
        return samples, self._axes[key]

    def _measured(self, samples: Samples) -> Axes:
        """Measure the output axes with the bare model, then restore it and what it draws from.

        Guesses are checked in eval mode, without dropout.
        """
        training = [module for module in self._model.modules() if module.training]
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            self._copy.undoing(samples.inputs, None) as undo,
        ):
            try:
                axes = Axes.measure(self.bare, samples, check=samples.guessed and not training)
                if training and samples.guessed:
                    for module in training:
                        module.training = False
                    Axes.measure(self.bare, samples, check=True)
                return axes
            finally:
                undo()

    def bare(self, inputs: Inputs) -> object:
        """Run the model without adapters."""
        with self._slots.hold(tasks=()):
            return inputs.call(self._model)

    def routed(self, route: Tensor, samples: Samples, axes: Axes | None, stacked: tuple) -> object:
        """Run the samples side by side under vmap, each as a batch of one.

        The result is exact whatever the model does with its batch axis.
        """
        tensors, rebuild = stacked

        def run(*slices: Tensor) -> object:
            return rebuild(slices).call(self._model)

        output = self._mapped(run, route, tensors, samples.inputs, routed=True)
        return (axes or Axes.of_one_sample(output)).joined(output)

    def routed_in_turn(self, route: Tensor, samples: Samples, axes: Axes | None) -> object:
        """Run one sample after the other."""
        outputs = []
        with self._sharing(len(route) > 1, samples.shared()) as shared:
            for i, task in enumerate(route.tolist()):
                outputs.append(self._single(() if task < 0 else (task,), samples.of(i), shared))
        output = join(outputs)
        return (axes or Axes.of_one_sample(output)).joined(output)

    # ------------------------------------------------------------------------------------------------------ one run

    def _group(self, group: tuple[int, ...], inputs: Inputs, *modes: TorchFunctionMode | None) -> Output:
        axis = torch.arange(len(group), device=self._copy.device)
        each = list(inputs.each.values())
        return self._mapped(lambda *each: inputs.call(self._model, each), axis, each, inputs, modes, tasks=group)

    def _mapped(
        self,
        run: Callable,
        axis: Tensor,
        values: Sequence[Tensor],
        inputs: Inputs,
        modes: Sequence[TorchFunctionMode | None] = (),
        **slots,
    ) -> Output:
        """Call ``run(*values)`` with ``axis`` and ``values`` mapped along their dim 0."""
        outputs, size, mapped, undo = [], axis.shape[0], Mapped(), self._slots.undo
        before_write = undo and undo.before_write
        rules = TaskRules(self._owned(inputs), before_write=before_write, mapped=mapped, adapters=self._copy.reads)

        def body(axis: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            with contextlib.ExitStack() as stack:
                for mode in filter(None, (rules, *modes)):
                    stack.enter_context(mode)
                stack.enter_context(self._slots.hold(axis=axis, **slots))
                output = Output.of(run(*values), is_mapped, size)
            outputs.append(output)
            return axis, *output.mapped_leaves()

        _, *results = torch.vmap(body, randomness="different")(axis, *values)
        self._check_nothing_kept(mapped, outputs[0])
        return outputs[0].with_mapped_leaves(results)

    def _check_nothing_kept(self, mapped: Mapped, output: Output) -> None:
        alive = mapped.alive(output.mapped_leaves())
        kept = where_kept(self._model, alive) if alive else None
        if kept:
            raise KeepsError(kept, alive)

    def _single(self, tasks: tuple[int, ...], inputs: Inputs, shared: SharedWork | None) -> Output:
        """Run the model with one adapter, or with none if ``tasks`` is empty."""
        origin, owned = self._slots.origin(tasks), self._owned(inputs)
        for tensor in inputs.tensors:
            unmark(tensor)
        each = [mark(tensor[0], origin) for tensor in inputs.each.values()]
        rules = TaskRules(owned, one_task=OneTask(origin, owned), adapters=self._copy.reads)
        try:
            with rules, shared or contextlib.nullcontext(), self._slots.hold(tasks=tasks, rules=rules):
                returned = inputs.call(self._model, each)
        except KeptError as error:
            raise error.named(where_kept(self._model, [error.tensor]), type(self._model).__name__) from None
        output = Output.of(returned, lambda tensor: shared is None or not shared.is_shared(tensor), 1)
        return output.with_mapped_leaves([leaf[None] for leaf in output.mapped_leaves()])

    def _owned(self, inputs: Inputs) -> set[int]:
        """Return the ids of the tensors that outlive a call."""
        return {id(tensor) for tensor in (*self._copy.tensors(), *inputs.tensors, *inputs.each.values())}

    @contextlib.contextmanager
    def _sharing(self, wanted: bool, inputs: Inputs) -> Iterator[SharedWork | None]:
        """Yield the memory that several runs of the model share; None for a single run, and in training."""
        if not wanted or self._copy.training:
            yield None
            return
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # SharedWork has to see writes
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield SharedWork([*self._copy.shared_tensors(), *inputs.tensors])
