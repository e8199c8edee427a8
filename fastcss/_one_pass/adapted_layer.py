"""Defines the layer that replaces an adapted layer in a model's copy: the base layer with all T adapters at once.

A layer runs in one of three ways, which ``Slots`` holds while a call is under way:

- one adapter (``axis`` is None): the layer of a model in which that adapter alone is active;
- the adapters ``tasks`` side by side, under ``torch.vmap``: an input that no adapter has touched yet has no task axis,
  and what the tasks share of this layer's work is done once;
- routed, under ``torch.vmap`` over the samples: each sample through adapter ``axis`` (-1: none).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._dispatch.private_apis import DisableTorchFunction
from .dora import scales_outputs
from .leaked_values import mark
from .read_adapters import LoraWeights
from .task_rules import TaskRules, on_physical_tensors
from .undo import Undo

AFTER_THE_CALL = (
    "one_pass: an adapted layer ran after its runner's call, as torch.utils.checkpoint does in the backward pass; use "
    "the model's own gradient_checkpointing_enable(), or none"
)


class Slots(threading.local):
    """Says what the layers of one runner compute in this thread's current call.

    Attributes:
        name: the unique name of the runner's copy of the model.
        tasks: the adapters of the current group, in order. If ``axis`` is None, it holds the one adapter of this pass,
            or is empty for the bare model.
        axis: the mapped tensor that stands for the task axis, or, if ``routed``, for the samples' adapter indices.
        routed: ``axis`` holds one adapter index per sample.
        rules: the rules that one adapter's pass runs under.
        running: a call is under way.
        undo: restores the model if the call fails half-way.
    """

    tasks: tuple[int, ...] = ()
    axis: Tensor | None = None
    routed: bool = False
    rules: TaskRules | None = None
    running: bool = False
    undo: Undo | None = None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name  # threading.local calls __init__ once in every thread, so each has the name

    def origin(self, tasks: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return the mark for tensors that depend on these adapters of this runner.

        It consists of plain values, since hooks keep and save such tensors.
        """
        return self.name, tasks

    @contextlib.contextmanager
    def hold(
        self,
        tasks: tuple[int, ...] = (),
        axis: Tensor | None = None,
        routed: bool = False,
        rules: TaskRules | None = None,
    ) -> Iterator[None]:
        before = self.tasks, self.axis, self.routed, self.rules, self.running
        self.tasks, self.axis, self.routed, self.rules, self.running = tasks, axis, routed, rules, True
        try:
            yield
        finally:
            self.tasks, self.axis, self.routed, self.rules, self.running = before


def _replace_bias(adapters: Sequence[LoraWeights | None]) -> bool:
    """Tell whether an adapter has a bias of its own in place of the base layer's."""
    return any(w is not None and w.base_bias is not None for w in adapters)


def _are_none(adapters: Sequence[LoraWeights | None]) -> bool:
    return len(adapters) > 0 and all(weights is None for weights in adapters)


class Adapted(nn.Module):
    """Runs a base layer with T adapters; a subclass says how several run on one input, or on one input each.

    ``is_idle`` says that none of the adapters covers the layer.
    """

    _packs: dict[tuple[int, ...], tuple[object, int]]  # tasks → the pack, and how many ranks it copied

    def __init__(self, base_layer: nn.Module, adapters: Sequence[LoraWeights | None], slots: Slots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = list(adapters)  # a plain list, so that the parameters still belong to the user's model
        self.is_idle = _are_none(adapters)
        self.slots = slots
        self.replaces_bias = _replace_bias(adapters)
        self.training = base_layer.training
        self.forget()

    def __getattr__(self, name: str):
        # Models read `layer.weight`, `layer.out_features`, … of the layers that this one replaces.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots
        if not slots.running:
            raise RuntimeError(AFTER_THE_CALL)
        with DisableTorchFunction():  # the task rules are for the model's own calls
            if slots.axis is not None:
                return on_physical_tensors(self._fold, x, slots.axis)
            y = (self.shared(x, slots.tasks) if self._covered(slots.tasks) else self.base(x[None]))[0]
        return mark(y, slots.origin(slots.tasks))

    def _fold(self, size: int, dims: tuple, x: Tensor, axis: Tensor) -> tuple[Tensor, int | None]:
        slots, dim = self.slots, dims[0]
        if slots.routed and not self.is_idle:
            return self.routed(x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0), axis), 0
        if not self._covered(slots.tasks):
            return self._bare(x, dim)
        if dim is None:
            return self.shared(x, slots.tasks), 0
        return self.diverged(x.movedim(dim, 0), slots.tasks), 0

    def _bare(self, x: Tensor, dim: int | None) -> tuple[Tensor, int | None]:
        """Run the base layer alone; an input without a task axis gives an output without one."""
        if dim is None:
            return self.base(x[None])[0], None
        return self.base(x.movedim(dim, 0)), 0

    def base(self, x: Tensor) -> Tensor:
        """Run the base layer on ``x`` [S, *]."""
        return self.base_layer(x)

    def _covered(self, tasks: tuple[int, ...]) -> bool:
        return any(self.adapters[t] is not None for t in tasks)

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Run ``x`` [*] through each adapter of ``tasks`` → [T, *]."""
        raise NotImplementedError

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Run each slice of ``x`` [T, *] through its own adapter of ``tasks`` → [T, *]."""
        raise NotImplementedError

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        """Run sample s of ``x`` [S, *] through adapter ``index[s]``, where -1 means none → [S, *]."""
        raise NotImplementedError

    def packed(self, tasks: tuple[int, ...]):
        """Return the pack of these adapters: kept until ``forget`` is called, or made anew if they are trained."""
        if torch.compiler.is_compiling() or self._trains(tasks):
            return self.pack(tasks)
        packs = self._packs
        kept = packs.get(tasks)
        if kept is None:
            # The pack holds normal tensors even under inference_mode, so that a later call may train through it.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._keep(packs, tasks)
        return kept[0]

    def tensors(self, tasks: tuple[int, ...] | None = None) -> list[Tensor]:
        """Return the adapters' tensors."""
        adapters = self.adapters if tasks is None else map(self.adapters.__getitem__, tasks)
        return [tensor for w in adapters if w is not None for tensor in w.tensors()]

    def packed_tensors(self) -> list[Tensor]:
        """Return what packs are made of: the base layer's too, where adapters scale by its norm or replace its bias."""
        weight = [self.base_layer.weight] if scales_outputs(self.adapters) else []
        bias = [self.base_layer.bias] if self.replaces_bias else []
        return [*self.tensors(), *weight, *bias]

    def _trains(self, tasks: tuple[int, ...]) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors(tasks))

    def take(self, adapters: Sequence[LoraWeights | None]) -> None:
        """Run these adapters from now on."""
        vars(self).update(adapters=list(adapters), is_idle=_are_none(adapters), replaces_bias=_replace_bias(adapters))
        self.forget()

    def forget(self) -> None:
        """Drop all packs, because the adapters' values have changed."""
        # nn.Module's own way to set an attribute takes longer than all else here.
        vars(self)["_packs"] = {}

    def _keep(self, packs: dict, tasks: tuple[int, ...]) -> tuple[object, int]:
        """Make the pack of ``tasks`` and keep it.

        Consecutive adapters get a view of the pack of all adapters; any other selection gets a pack of its own. All
        packs of their own together, except the newest, hold at most half of what the pack of all holds.
        """
        everything, ranks = self._all(), [0 if w is None else w.a.shape[0] for w in self.adapters]
        dtypes = {w.a.dtype for w in self.adapters if w is not None}
        is_part = tasks != everything and tasks == tuple(range(tasks[0], tasks[-1] + 1)) and len(dtypes) == 1
        copied = 0 if is_part else sum(ranks[t] for t in tasks)
        # Old packs are freed before the new one is made, so that the allocator can reuse their memory.
        others = {key: ranks for key, (_, ranks) in list(packs.items()) if key != everything}
        while others and (len(others) > 2 * len(ranks) or copied + sum(others.values()) > sum(ranks) // 2):
            oldest = next(iter(others))
            del others[oldest]
            packs.pop(oldest, None)
        if is_part:
            every, _ = packs.get(everything) or self._keep(packs, everything)
            kept = self.part(every, tasks), 0
        else:
            kept = self.pack(tasks), copied
        packs[tasks] = kept
        return kept

    def pack(self, tasks: tuple[int, ...]):
        raise NotImplementedError

    def part(self, every, tasks: tuple[int, ...]):
        """Return ``pack(tasks)`` for consecutive tasks, as views of the pack of all.

        Index -1 finds the next task's values there, or zeros. That does no harm, since only all adapters are routed.
        """
        raise NotImplementedError

    def _all(self) -> tuple[int, ...]:
        return tuple(range(len(self.adapters)))

    def _biases(self, tasks: tuple[int, ...], width: int, like: Tensor) -> Tensor | None:
        """Return what each adapter adds beside B A, ``scale · bias``, [T + 1, N]; the last row is of index -1.

        If any has a bias in place of the base layer's, the rows hold the base layer's bias or what replaces it, too.
        """
        adapters = [None if t is None else self.adapters[t] for t in (*tasks, None)]
        own = self.replaces_bias
        if not own and all(w is None or w.bias is None for w in adapters):
            return None
        zero, rows = like.new_zeros(width), []
        for w in adapters:
            row = zero
            if own:
                row = (self.base_layer.bias if w is None or w.base_bias is None else w.base_bias).to(like.dtype)
            rows.append(row if w is None or w.bias is None else row + w.bias.to(like.dtype) * w.scale)
        return torch.stack(rows)

    def _dropout(self, tasks: tuple[int, ...]) -> tuple[float, ...] | None:
        """Return each adapter's present dropout, [T + 1], or None if none has any."""
        dropout = [self._present_dropout(self.adapters[t]) for t in tasks]
        return (*dropout, 0.0) if any(dropout) else None

    def _present_dropout(self, weights: LoraWeights | None) -> float:
        if weights is None or not weights.dropout:
            return 0.0
        return weights.dropout if (weights.drops or self).training else 0.0

    def extra_repr(self) -> str:
        ranks = [0 if w is None else w.a.shape[0] for w in self.adapters]
        return f"ranks={ranks}"


def in_one_dtype(adapters: Sequence[LoraWeights | None], base: torch.dtype) -> list[LoraWeights | None]:
    """Convert the adapters to the one dtype in which they run beside a layer of dtype ``base``.

    That is ``base`` if it is float64 or all adapters have it, else float32. PEFT runs each adapter in its own dtype. No
    adapter loses precision here, except a float64 one beside a layer whose results are rounded anyway.
    """
    weights = [w for w in adapters if w is not None]
    dtype = base if base == torch.float64 or all(w.a.dtype == base for w in weights) else torch.float32
    return [w if w is None or w.a.dtype == dtype else w.to(w.a.device, dtype) for w in adapters]


def drop(x: Tensor, p: tuple[float, ...], index: Tensor | None) -> Tensor:
    """Apply dropout to ``x`` [S, *], in slot s with probability ``p[s]`` or ``p[index[s]]``."""
    p = torch.tensor(p, device=x.device)
    p = p[:-1] if index is None else p[index]
    p = p.view(-1, *[1] * (x.dim() - 1))
    kept = torch.where(p < 1, 1 - p, 1)  # the gradient of x / 0 would be NaN, though nothing of it is kept
    return torch.where(torch.rand(x.shape, device=x.device) >= p, x / kept.to(x.dtype), 0)
