"""The copy of a model that stands in for it, and the ways to run it for many adapters."""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._ops.fingerprint import Contents
from .adapted_kinds import adapted
from .adapted_layer import Adapted, Slots
from .changes import Snapshot, Watch
from .checkpointing import bind_checkpoints
from .group_size import Widest, group_size
from .hooks import has_own_hooks, take_hooks
from .inputs_outputs import Inputs, Output, join
from .kept_values import KeepsError, KeptError, Mapped, OneTask, mark, unmark, where_kept
from .read_adapters import Adapters
from .samples import Axes, Samples
from .shared_work import SharedWork
from .structural_copy import StructuralCopy
from .undo import Attributes, Undo
from .vmap_rules import TaskRules, is_mapped

MOST_KINDS = 256  # of batches, whose outputs are known to be put together in some way


class StandIn:
    """A structural copy of ``model`` that shares its tensors, with all adapters in each adapted layer.

    Args:
        around: modules that ``model`` is in, which are watched with it.

    Attributes:
        model: the copy.
        hooked: the name of a module with hooks that transformers did not make, None where there is none.
    """

    def __init__(self, model: nn.Module, adapters: Adapters, around: Iterable[nn.Module] = ()) -> None:
        _warn_of_fused_encoders(model, adapters)
        self._slots = Slots(uuid.uuid4().hex)
        self._attributes: Attributes | None = None
        self._axes: dict[tuple, Axes] = {}  # by training and the kind of batch
        self._widest: dict[tuple, int] = {}  # by input shapes: bytes of the widest tensor of one task
        copy, layers = StructuralCopy(model), {name: model.get_submodule(name) for name in adapters.layers}
        stand_ins: dict[str, tuple[nn.Module, Adapted]] = {}
        for name, layer in layers.items():
            if hasattr(layer, "base_layer"):
                ours = adapted(copy.of(layer.base_layer), adapters.layers[name], self._slots)
                copy.replace(layer, ours)
                stand_ins[name] = layer, ours
        self.model = copy.of(model)
        for name, layer in layers.items():
            if name in stand_ins:
                take_hooks(layer, stand_ins[name][1], copy)
            else:  # A bare layer is adapted under the name that an adapter gives it, and left bare wherever else it is.
                ours = adapted(copy.of(layer), adapters.layers[name], self._slots)
                parent, _, child = name.rpartition(".")
                self.model.get_submodule(parent)._modules[child] = ours
                stand_ins[name] = layer, ours
        self._layers = [ours for _, ours in stand_ins.values()]
        self._reads = {
            id(t): name
            for name, weights in adapters.layers.items()
            for w in weights
            if w is not None
            for t in (w.a, w.b)
        }
        self._watch = Watch(model, stand_ins, copy.pairs, around)
        self._buffers = [(theirs._buffers, ours._buffers) for theirs, ours in copy.pairs if ours._buffers]
        self._set_buffers = Snapshot([ours.values() for _, ours in self._buffers])
        self._contents = Contents(self.adapter_tensors())
        self._layer_of = [layer for layer in self._layers for _ in layer.tensors()]
        self._are_plain = all(type(t) in (Tensor, nn.Parameter) for t in self._contents.tensors)
        self.hooked = next((name for name, module in model.named_modules() if has_own_hooks(module)), None)

    @property
    def training(self) -> bool:
        return self.model.training

    @property
    def device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers of the base model."""
        return [*self.model.parameters(), *self.model.buffers()]

    def adapter_tensors(self) -> list[Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def follow(self) -> bool:
        """Take over what was set on the original since; False where it wants a new stand-in.

        Raises:
            RuntimeError: its adapters are switched off.
        """
        if torch.compiler.is_compiling():
            self._watch.follow_mode()
            return True
        disabled = self._watch.disabled()
        if disabled is not None:
            raise RuntimeError(
                f"one_pass: layer {disabled!r} has its adapters switched off; call the runner outside of "
                "disable_adapter(), or enable_adapters()"
            )
        return self._watch.is_as_built()

    def read_adapters(self) -> None:
        """Let layers forget packs of adapters whose values have changed; on a GPU, where to ask would stall, all."""
        if torch.compiler.is_compiling():
            return
        if self._are_plain and all(t.is_cpu for t in self._contents.tensors):
            self._contents.changed(lambda place: self._layer_of[place].forget())
        else:
            for layer in self._layers:
                layer.forget()

    def give_back(self) -> None:
        """Let the original have the buffers that a run has set anew; those written in place it shares."""
        if torch.compiler.is_compiling() or not self._set_buffers.differs():
            return
        for theirs, ours in self._buffers:
            theirs.update((name, value) for name, value in ours.items() if value is not theirs.get(name))
        self._set_buffers.take()
        self._watch.structure.take()

    def untrained(self, tasks: Sequence[int]) -> list[int]:
        """Those of ``tasks`` whose adapters get no gradient, where others do."""
        trains = {t: any(p.requires_grad for layer in self._layers for p in layer.tensors((t,))) for t in tasks}
        return [t for t, does in trains.items() if not does] if any(trains.values()) else []

    @contextlib.contextmanager
    def undoing(self, inputs: Inputs, known: set[int] | None) -> Iterator[Undo]:
        """What puts the model and its inputs back as they are now, after a run within that failed half-way.

        ``known`` are the ids of the tensors that earlier runs wrote, None where there was none.
        """
        if self._attributes is None:
            not_undone = (torch.jit.ScriptModule, Adapted)
            self._attributes = Attributes(m for m in self.model.modules() if not isinstance(m, not_undone))
        tensors = [*self.model.buffers(), *inputs.tensors, *inputs.each.values()]
        self._slots.undo = Undo(self._attributes, tensors, known)
        try:
            yield self._slots.undo
        finally:
            self._slots.undo = None

    def must_replay(self) -> str | None:
        """Why the model's present mode or its hooks rule vmap out, None where they do not."""
        for name, module in self.model.named_modules() if self.training else ():
            if getattr(module, "gradient_checkpointing", False):
                bind_checkpoints(self.model, self._slots)
                return f"{name or 'the model'} has gradient checkpointing on, which computes again outside of vmap"
            counts = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            if counts and module.training:
                return f"layer {name!r} updates its running statistics in every task's forward pass"
        if self.hooked is not None:
            return f"{self.hooked or 'the model'} has hooks, which see the tensors of one adapter at a time"
        return None

    # --------------------------------------------------------------------------------- every task on the same input

    def side_by_side(self, tasks: tuple[int, ...], size: int | None, inputs: Inputs) -> object:
        """Groups of ``size`` tasks under vmap, which share what no adapter touches.

        With None the size is ours to choose; on a CPU the first task of the first call runs alone, to be measured.
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
        """One task after the other; the later ones take over what no adapter touches."""
        with self._sharing(len(tasks) > 1, inputs) as shared:
            singles = [self._single((task,), inputs.of(slice(i, i + 1)), shared) for i, task in enumerate(tasks)]
            return join(singles).expanded()

    def _known_size(self, tasks: int, inputs: Inputs) -> int | None:
        """Tasks to run side by side; None where that has to be measured first."""
        if tasks == 1 or self.device.type != "cpu" or self.training:
            return tasks
        widest = self._widest.get(inputs.shapes)
        return None if widest is None else group_size(tasks, widest)

    # ------------------------------------------------------------------------------------ an adapter for each sample

    def samples(self, inputs: Inputs, size: int, names: Sequence[str] | None) -> tuple[Samples, Axes | None]:
        """The batch cut into samples, and how their outputs are put together; None for a batch of one."""
        samples = Samples(self.model, inputs, size, names)
        if size == 1:
            return samples, None
        key = self.training, samples.kind
        if key not in self._axes:
            if len(self._axes) > MOST_KINDS:
                self._axes.clear()
            self._axes[key] = self._measured(samples)
        return samples, self._axes[key]

    def _measured(self, samples: Samples) -> Axes:
        """By the bare model, after which everything is as it was; guesses are checked in eval mode, without dropout."""
        training = [module for module in self.model.modules() if module.training]
        with torch.no_grad(), torch.random.fork_rng(enabled=bool(training)), self.undoing(samples.inputs, None) as undo:
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
        """The model without adapters."""
        with self._slots.hold(tasks=()):
            return inputs.call(self.model)

    def routed(self, route: Tensor, samples: Samples, axes: Axes | None, stacked: tuple) -> object:
        """Under vmap over the samples, each a batch of one: exact whatever the model does with its batch axis."""
        tensors, rebuild = stacked

        def run(*slices: Tensor) -> object:
            return rebuild(slices).call(self.model)

        output = self._mapped(run, route, tensors, samples.inputs, routed=True)
        return (axes or Axes.of_one_sample(output)).joined(output)

    def routed_in_turn(self, route: Tensor, samples: Samples, axes: Axes | None) -> object:
        """One sample after the other."""
        outputs = []
        with self._sharing(len(route) > 1, samples.shared()) as shared:
            for i, task in enumerate(route.tolist()):
                outputs.append(self._single(() if task < 0 else (task,), samples.of(i), shared))
        output = join(outputs)
        return (axes or Axes.of_one_sample(output)).joined(output)

    # ------------------------------------------------------------------------------------------------------ one run

    def _group(self, group: tuple[int, ...], inputs: Inputs, *modes: TorchFunctionMode | None) -> Output:
        axis = torch.arange(len(group), device=self.device)
        each = list(inputs.each.values())
        return self._mapped(lambda *each: inputs.call(self.model, each), axis, each, inputs, modes, tasks=group)

    def _mapped(
        self,
        run: Callable,
        axis: Tensor,
        values: Sequence[Tensor],
        inputs: Inputs,
        modes: Sequence[TorchFunctionMode | None] = (),
        **slots,
    ) -> Output:
        """``run(*values)`` with ``axis`` and ``values`` mapped along their dim 0."""
        outputs, size, mapped, undo = [], axis.shape[0], Mapped(), self._slots.undo
        before_write = undo and undo.before_write
        rules = TaskRules(self._owned(inputs), before_write=before_write, mapped=mapped, adapters=self._reads)

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
        kept = where_kept(self.model, alive) if alive else None
        if kept:
            raise KeepsError(kept, alive)

    def _single(self, tasks: tuple[int, ...], inputs: Inputs, shared: SharedWork | None) -> Output:
        """The model with one adapter or, with ``tasks`` empty, none."""
        origin, owned = self._slots.origin(tasks), self._owned(inputs)
        for tensor in inputs.tensors:
            unmark(tensor)
        each = [mark(tensor[0], origin) for tensor in inputs.each.values()]
        rules = TaskRules(owned, one_task=OneTask(origin, owned), adapters=self._reads)
        try:
            with rules, shared or contextlib.nullcontext(), self._slots.hold(tasks=tasks, rules=rules):
                returned = inputs.call(self.model, each)
        except KeptError as error:
            raise error.named(where_kept(self.model, [error.tensor]), type(self.model).__name__) from None
        output = Output.of(returned, lambda tensor: shared is None or not shared.is_shared(tensor), 1)
        return output.with_mapped_leaves([leaf[None] for leaf in output.mapped_leaves()])

    def _owned(self, inputs: Inputs) -> set[int]:
        """Ids of the tensors that outlive a call."""
        return {id(tensor) for tensor in (*self.tensors(), *inputs.tensors, *inputs.each.values())}

    @contextlib.contextmanager
    def _sharing(self, wanted: bool, inputs: Inputs) -> Iterator[SharedWork | None]:
        """What several runs of the model share, None while there is one run only, or in training."""
        if not wanted or self.training:
            yield None
            return
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # SharedWork has to see writes
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield SharedWork([*self.tensors(), *inputs.tensors])


def _warn_of_fused_encoders(model: nn.Module, adapters: Adapters) -> None:
    for name, module in model.named_modules():
        inside = [layer for layer in adapters.layers if layer.startswith(f"{name}." if name else "")]
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            warnings.warn(
                f"one_pass: layer {inside[0]!r} is in a torch.nn.TransformerEncoderLayer, which in eval mode without "
                "gradients reads its layers' weights past PEFT, so that PEFT's own output ignores the adapter; one "
                "pass applies it, as PEFT does in training (or after torch.backends.mha.set_fastpath_enabled(False))",
                stacklevel=5,
            )
            return
