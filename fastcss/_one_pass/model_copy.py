"""Holds the copy of a model that runs in its place, with all adapters in each adapted layer."""

from __future__ import annotations

import contextlib
import re
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from .._ops.fingerprint import Contents
from .adapted_layer import Adapted, Slots
from .build_copy import BuiltCopy, build_copy
from .changes import Snapshot, Watch
from .checkpointing import bind_checkpoints
from .hooks import has_own_hooks
from .inputs_outputs import Inputs
from .peft_layers import tensors_of
from .read_adapters import Adapters
from .saved_modules import SavedModules
from .undo import Attributes, Undo, restore


class ModelCopy:
    """Copies the structure of ``model``, shares its tensors, and follows later changes of the original.

    Args:
        around: modules that contain ``model``, or that it is a twin of; they are watched with it.
        twins: modules of the user with those of ``model`` that are their twins, and whose copies follow them.

    Attributes:
        original: what is copied.
        model: the copy.
        slots: what the adapted layers in it compute in this thread's current call.
        reads: id of each adapter's tensor → the name of its layer.
        hooked: the name of a module with hooks that transformers did not make, or None.
        by_peft: a layer that has no form here, and what it is, or None.
        runs_pefts_layers: some layers have no form here, so that PEFT's own run in turn.
        lock: is held by the one call that may run if so, since some of them put other parameters into the copy.
    """

    def __init__(
        self, model: nn.Module, adapters: Adapters, around: Iterable[nn.Module] = (), twins: Sequence[tuple] = ()
    ) -> None:
        _warn_of_fused_encoders(model, adapters)
        modes = _parts_of_twins(model, twins)
        for theirs, part in modes:
            part.training = theirs.training
        self.slots = Slots(uuid.uuid4().hex)
        built = build_copy(model, adapters, self.slots)
        self.original, self.model, self.by_peft = model, built.model, _of_other_kind(built)
        self.runs_pefts_layers = bool(built.in_turn)
        self.lock = threading.RLock() if self.runs_pefts_layers else contextlib.nullcontext()
        self._names, self._layers = tuple(built.layers), [ours for _, ours in built.layers.values()]
        self._runs_in_turn, self._is_bound = bool(built.saved or built.in_turn), False
        self.hooked = next((name for name, module in model.named_modules() if has_own_hooks(module)), None)
        self._attributes: Attributes | None = None
        self._hold_what_tasks_own(built, adapters)
        followed = [(theirs, built.structure.of(twin)) for theirs, twin in twins]
        pairs = [*built.structure.pairs, *built.of_folders, *followed]
        self._watch = Watch(model, built.layers, built.saved | built.in_turn, pairs, around, modes)
        self._remember(built, adapters)

    def _hold_what_tasks_own(self, built: BuiltCopy, adapters: Adapters) -> None:
        """Note which tensors are one task's: passes do not share these, nor what only they depend on."""
        self._of_task: dict[int, list[Tensor]] = {task: [] for task in range(len(adapters.names))}
        for task, name in enumerate(adapters.names):
            for _, ours in built.saved.values():
                self._of_task[task] += ours.tensors(task)
            for layer, _ in built.in_turn.values():
                self._of_task[task] += tensors_of(layer, name)
        self._own = {id(tensor) for tensors in self._of_task.values() for tensor in tensors}

    def _remember_lora(self) -> None:
        """Remember which tensors the adapted layers read; later calls compare their values."""
        named = zip(self._names, self._layers, strict=True)
        held = [(tensor, name, layer) for name, layer in named for tensor in layer.packed_tensors()]
        self.reads = {
            id(tensor): name
            for name, layer in zip(self._names, self._layers, strict=True)
            for tensor in layer.tensors()
        }
        self._contents, self._layer_of = Contents([tensor for tensor, *_ in held]), [layer for *_, layer in held]
        self._are_plain = all(type(t) in (Tensor, nn.Parameter) for t in self._contents.tensors)

    def _remember(self, built: BuiltCopy, adapters: Adapters) -> None:
        """Remember what later calls compare: the values of adapters, and what runs and the user may replace."""
        self._remember_lora()
        self._made_of = Contents(adapters.made_of)
        self._made_of.changed()
        # What folders hold was converted to the dtype and device of these, which to() writes in place.
        likes = [p for module, _ in built.of_folders for p in module._parameters.values() if p is not None]
        self._likes = [(like, like.dtype, like.device) for like in likes]
        pairs = built.structure.pairs
        self._buffers = [(theirs._buffers, ours._buffers) for theirs, ours in pairs if ours._buffers]
        self._set_buffers = Snapshot([ours.values() for _, ours in self._buffers])
        # Some of PEFT's layers put other parameters into the base layer for the time of a call.
        by_peft = [ours._parameters for _, ours in pairs] if self.runs_pefts_layers else []
        self._parameters = [(now, now.copy()) for now in by_peft]
        self._set_parameters = Snapshot([now.values() for now in by_peft])
        self.is_spoilt = False  # a run of PEFT's layers failed half-way

    @property
    def training(self) -> bool:
        return self.model.training

    @property
    def device(self) -> torch.device:
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def tensors(self) -> list[Tensor]:
        """Return the parameters and buffers of the base model."""
        return [*self.model.parameters(), *self.model.buffers()]

    def shared_tensors(self) -> list[Tensor]:
        """Return those of them that belong to no adapter alone."""
        return [tensor for tensor in self.tensors() if id(tensor) not in self._own]

    def adapter_tensors(self) -> list[Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def follow(self) -> bool:
        """Take over what was set on the original since the last call; return False if a new copy is needed.

        Raises:
            RuntimeError: the original's adapters are switched off.
        """
        if torch.compiler.is_compiling():
            self._watch.follow_mode()
            return True
        return self.is_current()

    def is_current(self) -> bool:
        """Do what ``follow`` does outside of a trace."""
        disabled = self._watch.disabled()
        if disabled is not None:
            raise RuntimeError(
                f"one_pass: layer {disabled!r} has its adapters switched off; call the runner outside of "
                "disable_adapter(), or enable_adapters()"
            )
        if self.is_spoilt or any(like.dtype != dtype or like.device != device for like, dtype, device in self._likes):
            return False
        return not self._made_of.changed() and self._watch.is_as_built()

    def can_take(self, adapters: Adapters) -> bool:
        """Tell whether ``adapters`` can run without a new copy, as plain LoRA on the layers that are adapted now."""
        if adapters.saved or self._runs_in_turn or self._is_bound:
            return False
        return adapters.layers.keys() == set(self._names)

    def take(self, adapters: Adapters) -> None:
        """Let the adapted layers run ``adapters`` from now on, which ``can_take`` has allowed."""
        for name, layer in zip(self._names, self._layers, strict=True):
            layer.take(adapters.layers[name])
        self._of_task = {task: [] for task in range(len(adapters.names))}
        self._remember_lora()

    @property
    def lora_layers(self) -> dict[str, nn.Module]:
        """Return PEFT's LoRA layers that adapted layers run for, by name."""
        return self._watch.layers

    def came_and_went(self) -> tuple[set[str], set[str]] | None:
        """Return the adapters that PEFT's layers have got and lost; None if that cannot be told or is not all there."""
        return None if self._runs_in_turn else self._watch.came_and_went()

    def saw(self, came: Iterable[str], gone: Iterable[str]) -> None:
        """Watch PEFT's layers from now on as they are, with what ``came_and_went`` has found."""
        self._watch.take(came, gone)

    def stamp(self) -> tuple:
        """Return a stamp that changes where ``follow`` takes over what a compiled graph holds as it was."""
        return self._watch.stamp()

    def forget_changed_adapters(self) -> None:
        """Drop the packs of adapters whose values have changed; on a GPU drop all, since comparing would stall it."""
        if torch.compiler.is_compiling():
            return
        if self._are_plain and all(t.is_cpu for t in self._contents.tensors):
            self._contents.changed(lambda place: self._layer_of[place].forget())
        else:
            for layer in self._layers:
                layer.forget()

    def give_back(self) -> None:
        """Give the original the buffers that a run has replaced; buffers written in place are shared already.

        Parameters that PEFT's layers have replaced are those of the original again.
        """
        if torch.compiler.is_compiling():
            return
        self.put_parameters_back()
        if not self._set_buffers.differs():
            return
        for theirs, ours in self._buffers:
            theirs.update((name, value) for name, value in ours.items() if value is not theirs.get(name))
        self._set_buffers.take()
        self._watch.structure.take()

    def put_parameters_back(self) -> None:
        """Give modules their parameters again where PEFT's layers have put others for the time of a call."""
        if self._set_parameters.differs():
            for now, before in self._parameters:
                restore(now, before)

    def untrained(self, tasks: Sequence[int]) -> list[int]:
        """Return the ``tasks`` whose adapters get no gradient while others do."""
        held = {t: chain(self._of_task[t], *(layer.tensors((t,)) for layer in self._layers)) for t in tasks}
        trains = {t: any(tensor.requires_grad for tensor in tensors) for t, tensors in held.items()}
        return [t for t, does in trains.items() if not does] if any(trains.values()) else []

    @contextlib.contextmanager
    def undoing(self, inputs: Inputs, known: set[int] | None) -> Iterator[Undo]:
        """Yield an ``Undo`` that restores the model and its inputs if a run inside this context fails half-way.

        ``known`` holds the ids of the tensors that earlier runs wrote, or None if there was no earlier run.
        """
        if self._attributes is None:
            not_undone = (torch.jit.ScriptModule, Adapted, SavedModules)
            self._attributes = Attributes(m for m in self.model.modules() if not isinstance(m, not_undone))
        tensors = [*self.model.buffers(), *inputs.tensors, *inputs.each.values()]
        self.slots.undo = Undo(self._attributes, tensors, known)
        try:
            yield self.slots.undo
        finally:
            self.slots.undo = None

    def must_replay(self) -> str | None:
        """Return why the adapters' kind, the model's present mode or its hooks rule vmap out, or None."""
        for name, module in self.model.named_modules() if self.training else ():
            if getattr(module, "gradient_checkpointing", False):
                bind_checkpoints(self.model, self.slots)
                self._is_bound = True  # backward passes to come compute again with the adapters as they are now
                return f"{name or 'the model'} has gradient checkpointing on, which computes again outside of vmap"
            counts = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            if counts and module.training:
                return f"layer {name!r} updates its running statistics in every task's forward pass"
        if self.hooked is not None:
            return f"{self.hooked or 'the model'} has hooks, which see the tensors of one adapter at a time"
        return None


def _of_other_kind(built: BuiltCopy) -> str | None:
    """Return the name and class of a layer that PEFT's own runs, and that is not of trainable tokens; or None."""
    others = {name: type(layer) for name, (layer, ours) in built.in_turn.items() if ours.skips_others}
    return next((f"layer {name!r} is {cls.__module__}.{cls.__name__}" for name, cls in others.items()), None)


def _parts_of_twins(model: nn.Module, twins: Sequence[tuple]) -> list[tuple[nn.Module, nn.Module]]:
    """Return what PEFT has put into ``model``, a twin, with the user's modules whose train() and eval() it follows."""
    if not twins:
        return []
    theirs, pairs = dict(twins[0][0].named_modules()), []
    for name, layer in model.named_modules():
        for inner, part in layer.named_modules() if hasattr(layer, "adapter_layer_names") and name in theirs else ():
            inside = re.sub(r"^(base_layer|original_module|modules_to_save\.[^.]+)\b", name, inner)
            pairs.append((theirs.get(inside, theirs[name]), part))
    return pairs


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
