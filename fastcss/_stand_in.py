"""The copy of a model that stands in for it, and the ways to run it for many adapters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._adapted_layers import Adapted, Slots, adapted
from ._outputs import Output, join
from ._read_adapters import Adapters
from ._replay import SharedWork
from ._task_rules import TaskRules, is_mapped


class StandIn:
    """A structural copy of ``model`` that shares its tensors, with all adapters in each adapted layer."""

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        tensors = chain(model.parameters(), model.buffers())
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self._pairs = list(zip(model.modules(), self.model.modules(), strict=True))
        self._slots = Slots()
        self._owned = {id(tensor) for tensor in self.tensors()}
        layers = dict(self.model.named_modules())
        replaced: dict[nn.Module, Adapted] = {}
        for name, weights in adapters.layers.items():
            layer = layers[name]  # PEFT's layer, or the bare one
            replaced[layer] = adapted(getattr(layer, "base_layer", layer), weights, self._slots)
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = replaced.get(child, child)
        self._pairs = [(original, replaced.get(ours, ours)) for original, ours in self._pairs]

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
        layers = [layer for layer in self.model.modules() if isinstance(layer, Adapted)]
        weights = [w for layer in layers for w in layer.adapters if w is not None]
        return [t for w in weights for t in (w.a, w.b, w.bias) if t is not None]

    def follow_mode(self) -> None:
        """Take over train() and eval() of the original's modules."""
        for original, ours in self._pairs:
            if ours.training is not original.training:
                ours.training = original.training

    def snapshot(self) -> Callable[[], None]:
        """What puts the buffers back as they are now, after a run that failed half-way."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def undo() -> None:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

        return undo

    def must_replay(self) -> str | None:
        """Why the model's present mode rules vmap out, None where it does not."""
        if self.training:
            for name, module in self.model.named_modules():
                if getattr(module, "gradient_checkpointing", False):
                    raise ValueError(
                        f"one_pass: {name or 'the model'} has gradient checkpointing on; turn it off to train"
                    )
                if (
                    isinstance(module, nn.modules.batchnorm._NormBase)
                    and module.training
                    and module.track_running_stats
                ):
                    return f"layer {name!r} updates its running statistics in every task's forward pass"
        return None

    # --------------------------------------------------------------------------------- every task on the same input

    def side_by_side(self, tasks: tuple[int, ...], group_size: int, args: tuple, kwargs: dict) -> object:
        """Groups of tasks under vmap; the groups share what no adapter touches."""
        groups = [tasks[start : start + group_size] for start in range(0, len(tasks), group_size)]
        outputs = []
        with self._sharing(len(groups), (args, kwargs)) as shared:
            for group in groups:
                axis = torch.arange(len(group), device=self.device)
                outputs.append(self._mapped(lambda: self.model(*args, **kwargs), axis, (), shared, tasks=group))
        return join(outputs).expanded()

    def in_turn(self, tasks: tuple[int, ...], args: tuple, kwargs: dict) -> object:
        """One task after the other; the later ones take over what no adapter touches."""
        with self._sharing(len(tasks), (args, kwargs)) as shared:
            return join([self._single((task,), shared, args, kwargs) for task in tasks]).expanded()

    # ------------------------------------------------------------------------------------ an adapter for each sample

    def routed(self, route: Tensor, args: tuple, kwargs: dict) -> object:
        """Under vmap over the samples, each a batch of one: exact whatever the model does with its batch axis."""
        samples, rebuild = _batched(route, args, kwargs)

        def run(*samples: Tensor) -> object:
            args, kwargs = rebuild([sample[None] for sample in samples])
            return self.model(*args, **kwargs)

        return self._mapped(run, route, samples, None, routed=True).as_batch()

    def routed_in_turn(self, route: Tensor, args: tuple, kwargs: dict) -> object:
        """One sample after the other."""
        samples, rebuild = _batched(route, args, kwargs)
        outputs = []
        with self._sharing(len(route), rebuild([None] * len(samples))) as shared:
            for i, task in enumerate(route.tolist()):
                args, kwargs = rebuild([sample[i : i + 1] for sample in samples])
                outputs.append(self._single(() if task < 0 else (task,), shared, args, kwargs))
        return join(outputs).as_batch()

    # ------------------------------------------------------------------------------------------------------ one run

    def _mapped(
        self, run: Callable, axis: Tensor, inputs: Sequence[Tensor], shared: SharedWork | None, **slots
    ) -> Output:
        """``run(*inputs)`` with ``axis`` and ``inputs`` mapped along their dim 0."""
        outputs, size = [], axis.shape[0]

        def body(axis: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            with TaskRules(self._owned), shared or contextlib.nullcontext(), self._slots.hold(axis=axis, **slots):
                output = Output.of(run(*inputs), is_mapped, size)
            outputs.append(output)
            return axis, *output.mapped_leaves()

        _, *values = torch.vmap(body, randomness="different")(axis, *inputs)
        return outputs[0].with_mapped_leaves(values)

    def _single(self, tasks: tuple[int, ...], shared: SharedWork | None, args: tuple, kwargs: dict) -> Output:
        """The model with one adapter or, with ``tasks`` empty, none."""
        with TaskRules(self._owned), shared or contextlib.nullcontext(), self._slots.hold(tasks=tasks):
            returned = self.model(*args, **kwargs)
        output = Output.of(returned, lambda tensor: shared is None or not shared.is_shared(tensor), 1)
        return output.with_mapped_leaves([leaf[None] for leaf in output.mapped_leaves()])

    @contextlib.contextmanager
    def _sharing(self, runs: int, inputs: object) -> Iterator[SharedWork | None]:
        """Share work between ``runs`` runs of the model."""
        if runs == 1 or self.training:
            yield None
            return
        given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        shared = SharedWork([*self.tensors(), *given])
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # SharedWork has to see writes
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield shared


def _batched(route: Tensor, args: tuple, kwargs: dict) -> tuple[list[Tensor], Callable[[list], tuple[tuple, dict]]]:
    """The tensors with the batch along dim 0, and how to put others in their places."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    size = route.shape[0]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size]
    if not places:
        raise ValueError(f"one_pass: route has {size} entries, and no input has a batch of that length along dim 0")

    def rebuild(tensors: list) -> tuple[tuple, dict]:
        filled = dict(zip(places, tensors, strict=True))
        return pytree.tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], structure)

    return [leaves[i] for i in places], rebuild
