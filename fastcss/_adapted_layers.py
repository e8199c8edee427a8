"""The layers that stand in a model's copy for its adapted ones: the base layer with all T adapters at once.

A layer runs in one of three ways, which ``Slots`` holds while a call is under way:

- one adapter (``axis`` is None): the layer of a model in which that adapter alone is active;
- the adapters ``tasks`` side by side, under ``torch.vmap``: an input that no adapter has touched yet has no task axis,
  and what the tasks share of this layer's work is done once;
- routed, under ``torch.vmap`` over the samples: each sample through adapter ``axis`` (-1: none).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._linear import linear
from ._read_adapters import LoraWeights, is_conv1d, kind_of
from ._task_rules import on_physical_tensors
from .ops import multi_lora
from .packed_lora import PackedLora


class Slots(threading.local):
    """What the layers of one runner compute in this thread's current call.

    Attributes:
        tasks: the adapters of the current group, in order; with ``axis`` None the one adapter, or none: the bare model.
        axis: the mapped tensor that stands for the task axis, or for the samples' adapter indices where ``routed``.
        routed: ``axis`` holds one adapter index a sample.
    """

    tasks: tuple[int, ...] = ()
    axis: Tensor | None = None
    routed: bool = False

    @contextlib.contextmanager
    def hold(self, tasks: tuple[int, ...] = (), axis: Tensor | None = None, routed: bool = False) -> Iterator[None]:
        before = self.tasks, self.axis, self.routed
        self.tasks, self.axis, self.routed = tasks, axis, routed
        try:
            yield
        finally:
            self.tasks, self.axis, self.routed = before


def adapted(base: nn.Module, adapters: Sequence[LoraWeights | None], slots: Slots) -> Adapted:
    """The stand-in for ``base`` with ``adapters``."""
    kind = {"linear": AdaptedLinear, "conv2d": AdaptedConv2d, "embedding": AdaptedEmbedding}[kind_of(base)]
    return kind(base, adapters, slots)


class Adapted(nn.Module):
    """A base layer with T adapters; a subclass says how several of them run on one input or on one input each."""

    def __init__(self, base_layer: nn.Module, adapters: Sequence[LoraWeights | None], slots: Slots) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = list(adapters)  # a plain list: the parameters stay the user's model's
        self.slots = slots
        self.training = base_layer.training
        self._packs: dict[tuple[int, ...], tuple[tuple, object]] = {}

    def __getattr__(self, name: str):
        # Models read `layer.weight`, `layer.out_features`, … of the layers that we stand in for.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.slots
        with torch._C.DisableTorchFunction():  # the task rules are for the model's own calls
            if slots.axis is not None:
                return on_physical_tensors(self._fold, x, slots.axis)
            if not self._covered(slots.tasks):
                return self.base(x[None])[0]
            return self.shared(x, slots.tasks)[0]

    def _fold(self, size: int, dims: tuple, x: Tensor, axis: Tensor) -> tuple[Tensor, int | None]:
        slots, dim = self.slots, dims[0]
        if slots.routed:
            return self.routed(x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0), axis), 0
        if not self._covered(slots.tasks):
            return self._bare(x, dim)
        if dim is None:
            return self.shared(x, slots.tasks), 0
        return self.diverged(x.movedim(dim, 0), slots.tasks), 0

    def _bare(self, x: Tensor, dim: int | None) -> tuple[Tensor, int | None]:
        """No adapter of the group touches this layer: an input without a task axis stays without."""
        if dim is None:
            return self.base(x[None])[0], None
        return self.base(x.movedim(dim, 0)), 0

    def base(self, x: Tensor) -> Tensor:
        """The base layer on ``x`` [S, *]."""
        return self.base_layer(x)

    def _covered(self, tasks: tuple[int, ...]) -> bool:
        return any(self.adapters[t] is not None for t in tasks)

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """``x`` [*] through each adapter of ``tasks`` → [T, *]."""
        raise NotImplementedError

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """``x`` [T, *], each through its own adapter of ``tasks`` → [T, *]."""
        raise NotImplementedError

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        """``x`` [S, *], sample s through adapter ``index[s]``, -1 for none → [S, *]."""
        raise NotImplementedError

    def packed(self, tasks: tuple[int, ...]):
        """What ``pack`` makes of these adapters; kept as long as none of them changes, made anew where they train."""
        weights = [w for w in map(self.adapters.__getitem__, tasks) if w is not None]
        tensors = [t for w in weights for t in (w.a, w.b, w.bias) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self.pack(tasks)
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)
        kept = self._packs.get(tasks)
        if kept is None or kept[0] != stamp:
            # Normal tensors even under inference_mode, so that a later call may train the base weights through them.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._packs[tasks] = (stamp, self.pack(tasks))
        return kept[1]

    def pack(self, tasks: tuple[int, ...]):
        raise NotImplementedError

    def _all(self) -> tuple[int, ...]:
        return tuple(range(len(self.adapters)))

    def _biases(self, tasks: tuple[int, ...], width: int, like: Tensor) -> Tensor | None:
        """``scale · bias`` of each adapter [T + 1, N], with a row of zeros at the end, where index -1 finds it."""
        adapters = [self.adapters[t] for t in tasks]
        if all(w is None or w.bias is None for w in adapters):
            return None
        zero = like.new_zeros(width)
        return torch.stack([zero if w is None or w.bias is None else w.bias * w.scale for w in adapters] + [zero])

    def _dropout(self, tasks: tuple[int, ...]) -> tuple[float, ...] | None:
        """Each adapter's dropout in training [T + 1], None where there is none."""
        dropout = [0.0 if self.adapters[t] is None else self.adapters[t].dropout for t in tasks]
        return (*dropout, 0.0) if self.training and any(dropout) else None

    def extra_repr(self) -> str:
        ranks = [0 if w is None else w.a.shape[0] for w in self.adapters]
        return f"ranks={ranks}"


def _drop(x: Tensor, p: tuple[float, ...], index: Tensor | None) -> Tensor:
    """Dropout on ``x`` [S, *], in slot s with probability ``p[s]`` or ``p[index[s]]``."""
    p = torch.tensor(p, device=x.device)
    p = p[:-1] if index is None else p[index]
    p = p.view(-1, *[1] * (x.dim() - 1))
    return torch.where(torch.rand(x.shape, device=x.device) >= p, x / (1 - p).to(x.dtype), 0)


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    lora: PackedLora
    biases: Tensor | None  # [T + 1, N]


class AdaptedLinear(Adapted):
    """A linear layer on ``multi_lora``."""

    def base(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self.base_layer.bias)

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._run(x, tasks, "shared")

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._run(x, tasks, "diverged")

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        return self._run(x, self._all(), "routed", index)

    def _run(self, x: Tensor, tasks: tuple[int, ...], mode: str, index: Tensor | None = None) -> Tensor:
        pack, p = self.packed(tasks), self._dropout(tasks)
        if p is None:
            y = multi_lora(x, self._weight, pack.lora, self.base_layer.bias, mode=mode, index=index)
        else:
            y = self._dropped(x.expand(len(tasks), *x.shape) if mode == "shared" else x, pack.lora, p, index)
        if pack.biases is None:
            return y
        biases = pack.biases[:-1] if index is None else pack.biases[index]
        return y + biases.to(y.dtype).view(y.shape[0], *[1] * (y.dim() - 2), -1)

    def _dropped(self, x: Tensor, lora: PackedLora, p: tuple[float, ...], index: Tensor | None) -> Tensor:
        """``x`` [S, *, K] where the adapters see it with dropout, and the base layer without."""
        y = F.linear(x, self._weight, self.base_layer.bias)
        a, b = (F.pad(padded, (0, 0, 0, 0, 0, 1)) for padded in lora.padded())  # [T + 1, R, ·], the last one zeros
        index = torch.arange(x.shape[0], device=x.device) if index is None else index
        x = _drop(x, p, index).to(a.dtype).reshape(x.shape[0], -1, x.shape[-1])
        hidden = torch.bmm(x, a[index].transpose(1, 2)) * F.pad(lora.scales, (0, 1))[index].view(-1, 1, 1)
        return (y + torch.bmm(hidden, b[index]).view(y.shape)).to(y.dtype)

    @property
    def _weight(self) -> Tensor:
        return self.base_layer.weight.t() if is_conv1d(self.base_layer) else self.base_layer.weight

    def pack(self, tasks: tuple[int, ...]) -> PackedLinear:
        width_out, width_in = self._weight.shape
        adapters = [self.adapters[t] for t in tasks]
        like = next(w.a for w in adapters if w is not None)
        lora = PackedLora.pack(
            [like.new_zeros(0, width_in) if w is None else w.a for w in adapters],
            [like.new_zeros(width_out, 0) if w is None else w.b for w in adapters],
            [0.0 if w is None else w.scale for w in adapters],
        )
        return PackedLinear(lora, self._biases(tasks, width_out, like))


@dataclasses.dataclass(frozen=True)
class PackedConv2d:
    a: Tensor  # [T + 1, R, C, kh, kw], the last one zeros: index -1
    b: Tensor  # [T + 1, N, R], scaled
    biases: Tensor | None  # [T + 1, N]

    def of(self, index: Tensor | slice) -> PackedConv2d:
        return PackedConv2d(self.a[index], self.b[index], None if self.biases is None else self.biases[index])


EACH_TASK = slice(None, -1)


class AdaptedConv2d(Adapted):
    """A convolution: the base once, the shrink of all tasks as one (grouped) convolution, the expand as one bmm.

    Ranks are padded to the largest: a rank-r shrink costs r / N of the base convolution, so there is little to save.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])[0] if x.dim() == 3 else super().forward(x)

    def base(self, x: Tensor) -> Tensor:
        return self.base_layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        if self._dropout(tasks):
            return self.diverged(x.expand(len(tasks), *x.shape), tasks)
        pack = self.packed(tasks).of(EACH_TASK)
        base = self.base_layer(x)
        hidden = self._shrink(x, pack.a, 1)
        return self._expand(base.expand(len(tasks), *base.shape), hidden, pack)

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._each(x, self.packed(tasks).of(EACH_TASK), self._dropout(tasks), None)

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        return self._each(x, self.packed(self._all()).of(index), self._dropout(self._all()), index)

    def _each(self, x: Tensor, pack: PackedConv2d, p: tuple[float, ...] | None, index: Tensor | None) -> Tensor:
        """``x`` [S, B, C, H, W] with weights of its own for each slot."""
        base = self.base(x)
        x = x if p is None else _drop(x, p, index)
        hidden = self._shrink(x.transpose(0, 1).flatten(1, 2), pack.a, x.shape[0])  # on [B, S·C, H, W]
        return self._expand(base, hidden, pack)

    def _shrink(self, x: Tensor, a: Tensor, groups: int) -> Tensor:
        """``x`` with the slots' channels side by side, or with channels that all slots share → [B, S·R, H, W]."""
        base = self.base_layer
        return F.conv2d(x.to(a.dtype), a.flatten(0, 1), None, base.stride, base.padding, 1, groups)

    @staticmethod
    def _expand(base: Tensor, hidden: Tensor, pack: PackedConv2d) -> Tensor:
        """``base`` [S, B, N, H, W] + b [S, N, R] · ``hidden`` [B, S·R, H, W]."""
        slots, batch = base.shape[:2]
        hidden = hidden.unflatten(1, (slots, -1)).transpose(0, 1).flatten(0, 1).flatten(2)  # [S·B, R, H·W]
        b = pack.b[:, None].expand(-1, batch, -1, -1).flatten(0, 1).to(hidden.dtype)
        # In the adapters' dtype, rounded once to the base layer's: as PEFT does.
        y = torch.baddbmm(base.to(hidden.dtype).flatten(3).flatten(0, 1), b, hidden).view(base.shape)
        if pack.biases is not None:
            y = y + pack.biases[:, None, :, None, None]
        return y.to(base.dtype)

    def pack(self, tasks: tuple[int, ...]) -> PackedConv2d:
        adapters = [self.adapters[t] for t in tasks]
        like = next(w.a for w in adapters if w is not None)
        width, rank = self.base_layer.out_channels, max(w.a.shape[0] for w in adapters if w is not None)
        a, b = [], []
        for weights in [*adapters, None]:
            if weights is None:
                a.append(like.new_zeros(rank, *like.shape[1:]))
                b.append(like.new_zeros(width, rank))
                continue
            missing = rank - weights.a.shape[0]
            a.append(F.pad(weights.a, (0, 0) * 3 + (0, missing)))
            b.append(F.pad(_dense(weights.b, self.base_layer.groups) * weights.scale, (0, missing)))
        return PackedConv2d(torch.stack(a), torch.stack(b), self._biases(tasks, width, like))


def _dense(b: Tensor, groups: int) -> Tensor:
    """The weight [N, r / groups, 1, 1] of a grouped 1×1 convolution as the matrix [N, r] that does the same."""
    blocks = b.flatten(1).unflatten(0, (groups, -1))  # [G, N / G, r / G]
    return torch.block_diag(*blocks) if groups > 1 else blocks[0]


class AdaptedEmbedding(Adapted):
    """An embedding: the base table once, and for each task rank-r rows expanded to the width."""

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        base = self.base_layer(x)
        return torch.stack([self._add(base, x, weights) for weights in self.packed(tasks)])

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        base = self.base_layer(x)
        return torch.stack([self._add(base[s], x[s], weights) for s, weights in enumerate(self.packed(tasks))])

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        base, packed = self.base_layer(x), [*self.packed(self._all()), None]
        return torch.stack([self._add(base[s], x[s], packed[t]) for s, t in enumerate(index.tolist())])

    def _add(self, base: Tensor, x: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
        if weights is None:
            return base
        table, up = weights
        return (base + F.embedding(x, table, self.base_layer.padding_idx) @ up).to(base.dtype)

    def pack(self, tasks: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """Each adapter's table [V, r] and its scaled rows [r, N]."""
        adapters = [self.adapters[t] for t in tasks]
        return [None if w is None else (w.a.t().contiguous(), w.b.t() * w.scale) for w in adapters]
