"""Runs linear layers and embeddings with all their adapters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dispatch.private_apis import forward_mode, transforms_are_active
from .._fuse.linear import linear
from ..ops import multi_lora
from ..packed_lora import PackedLora
from .adapted_conv2d import AdaptedConv2d
from .adapted_layer import Adapted, Slots, drop, in_one_dtype
from .dora import output_scales
from .read_adapters import LoraWeights, is_conv1d, kind_of


def adapted(base: nn.Module, adapters: Sequence[LoraWeights | None], slots: Slots) -> Adapted:
    """Make the layer that replaces ``base`` with its ``adapters``; those of a pool bring their own."""
    if hasattr(adapters, "over"):
        return adapters.over(base, slots)
    kind = {"linear": AdaptedLinear, "conv2d": AdaptedConv2d, "embedding": AdaptedEmbedding}[kind_of(base)]
    return kind(base, adapters, slots)


def _of_slots(rows: Tensor, index: Tensor | None, y: Tensor) -> Tensor:
    """Return the rows [T + 1, N] of the slots that ``y`` [S, *, N] has, in a shape and dtype that fit it."""
    rows = rows[:-1] if index is None else rows[index]
    return rows.to(y.dtype).view(y.shape[0], *[1] * (y.dim() - 2), -1)


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    lora: PackedLora
    biases: Tensor | None  # [T + 1, N]
    scales: Tensor | None = None  # [T + 1, N], DoRA's


class AdaptedLinear(Adapted):
    """Runs a linear layer on ``multi_lora``."""

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
        bias = None if self.replaces_bias else self.base_layer.bias
        if p is not None:
            y = self._dropped(x.expand(len(tasks), *x.shape) if mode == "shared" else x, tasks, pack, bias, p, index)
        elif pack.scales is None:
            y = multi_lora(x, self._weight, pack.lora, bias, mode=mode, index=index)
        else:
            y = multi_lora(x, self._weight, pack.lora, None, mode=mode, index=index)
            scales = _of_slots(pack.scales, index, y)
            is_traced = y.requires_grad or scales.requires_grad or transforms_are_active() or forward_mode()
            out = None if is_traced else y
            y = torch.mul(y, scales, out=out) if bias is None else torch.addcmul(bias.to(y.dtype), y, scales, out=out)
        return y if pack.biases is None else y + _of_slots(pack.biases, index, y)

    def _dropped(
        self,
        x: Tensor,
        tasks: tuple[int, ...],
        pack: PackedLinear,
        bias: Tensor | None,
        p: tuple[float, ...],
        index: Tensor | None,
    ) -> Tensor:
        """Run ``x`` [S, *, K] through the adapters with dropout, and through the base layer without.

        What DoRA's scales add to the base layer's output, (scale − 1) · x Wᵀ, is of the dropped input.
        """
        lora, scales = pack.lora, pack.scales
        y = F.linear(x, self._weight, bias)
        a, b = (F.pad(padded, (0, 0, 0, 0, 0, 1)) for padded in lora.padded())  # [T + 1, R, ·], the last one zeros
        index = torch.arange(x.shape[0], device=x.device) if index is None else index
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        dropped = drop(x, p, index).to(a.dtype)
        hidden = torch.bmm(dropped, a[index].transpose(1, 2))
        if any(weights and weights.taken_out for weights in self.adapters):
            kept = torch.bmm(x.to(a.dtype), a[index].transpose(1, 2))
            hidden = torch.where(self._taken_out(tasks, lora)[index, None], kept, hidden)
        hidden = hidden * F.pad(lora.scales, (0, 1))[index].view(-1, 1, 1)
        added = torch.bmm(hidden, b[index])
        if scales is not None:
            scales = scales[index, None]
            added = added * scales + F.linear(dropped.to(x.dtype), self._weight) * (scales - 1)
        return (y + added.view(y.shape)).to(y.dtype)

    def _taken_out(self, tasks: tuple[int, ...], lora: PackedLora) -> Tensor:
        """Mark the rows of the padded ``lora.a`` that undo a part of the base layer, bool [T + 1, R]."""
        out = [0 if self.adapters[t] is None else self.adapters[t].taken_out for t in tasks]
        row = torch.arange(lora.max_rank)
        of_base = [(row >= rank - n) & (row < rank) for rank, n in zip(lora.ranks, out, strict=True)]
        return torch.stack([*of_base, torch.zeros_like(row, dtype=torch.bool)]).to(lora.a.device)

    @property
    def _weight(self) -> Tensor:
        return self.base_layer.weight.t() if is_conv1d(self.base_layer) else self.base_layer.weight

    def pack(self, tasks: tuple[int, ...]) -> PackedLinear:
        width_out, width_in = self._weight.shape
        adapters = in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
        like = next(w.a for w in adapters if w is not None)
        ranks = tuple(0 if w is None else int(w.a.shape[0]) for w in adapters)  # sizes are tensors in torch.jit.trace
        scales = tuple(0.0 if w is None else w.scale for w in adapters)
        a = torch.cat([like.new_zeros(0, width_in) if w is None else w.a for w in adapters])
        b = torch.cat([like.new_zeros(0, width_out) if w is None else w.b.t() for w in adapters])
        if like.dtype == torch.float64:  # scales in float32 would cost it precision
            of_row = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
            b, scales = b * b.new_tensor(of_row)[:, None], (1.0,) * len(scales)
        layout = _kept_layout if like.is_cuda and not torch.compiler.is_compiling() else _layout
        lora = PackedLora(a, b, ranks, *layout(ranks, scales, like.device))
        return PackedLinear(lora, self._biases(tasks, width_out, like), output_scales(adapters, self.base_layer, like))

    def part(self, every: PackedLinear, tasks: tuple[int, ...]) -> PackedLinear:
        lora, first, end = every.lora, tasks[0], tasks[-1] + 1
        rows = slice(sum(lora.ranks[:first]), sum(lora.ranks[:end]))
        ranks, scales = lora.ranks[first:end], lora.scales[first:end]
        lora = PackedLora(lora.a[rows], lora.b[rows], ranks, lora.offsets[first : end + 1] - rows.start, scales)
        biases, scales = (t if t is None else t[first : end + 1] for t in (every.biases, every.scales))
        return PackedLinear(lora, biases, scales)


def _layout(ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a pack's offsets and scales as tensors."""
    with torch.inference_mode(False):
        offsets = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32, device=device)
        return offsets, torch.tensor(scales, dtype=torch.float32, device=device)


# A CUDA graph cannot hold copies from the host, so these tensors are made once and kept.
_kept_layout = functools.lru_cache(maxsize=1024)(_layout)


@dataclasses.dataclass(frozen=True)
class PackedTable:
    table: Tensor  # [V, r]
    up: Tensor  # [r, N], scaled
    scales: Tensor | None  # [N], DoRA's


class AdaptedEmbedding(Adapted):
    """Runs an embedding: looks the base table up once, and for each task rank-r rows, expanded to the full width."""

    def shared(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        base = self.base_layer(x)
        return torch.stack([self._add(base, x, weights) for weights in self.packed(tasks)])

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        base = self.base_layer(x)
        return torch.stack([self._add(base[s], x[s], weights) for s, weights in enumerate(self.packed(tasks))])

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        base, packed = self.base_layer(x), [*self.packed(self._all()), None]
        return torch.stack([self._add(base[s], x[s], packed[t]) for s, t in enumerate(index.tolist())])

    def _add(self, base: Tensor, x: Tensor, weights: PackedTable | None) -> Tensor:
        if weights is None:
            return base
        y = base + F.embedding(x, weights.table, self.base_layer.padding_idx) @ weights.up
        return (y if weights.scales is None else y * weights.scales).to(base.dtype)

    def pack(self, tasks: tuple[int, ...]) -> list[PackedTable | None]:
        adapters = in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
        packs: list[PackedTable | None] = []
        for w in adapters:
            scales = None if w is None else output_scales([w], self.base_layer, w.a)
            scales = scales if scales is None else scales[0]
            packs.append(w if w is None else PackedTable(w.a.t().contiguous(), w.b.t() * w.scale, scales))
        return packs

    def part(self, every: list, tasks: tuple[int, ...]) -> list[PackedTable | None]:
        return every[tasks[0] : tasks[-1] + 1]
