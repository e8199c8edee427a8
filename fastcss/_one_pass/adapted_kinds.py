"""Runs linear layers, convolutions and embeddings with all their adapters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._fuse.linear import linear
from ..ops import multi_lora
from ..packed_lora import PackedLora
from .adapted_layer import Adapted, Slots
from .read_adapters import LoraWeights, is_conv1d, kind_of


def adapted(base: nn.Module, adapters: Sequence[LoraWeights | None], slots: Slots) -> Adapted:
    """Make the layer that replaces ``base`` with its ``adapters``; those of a pool bring their own."""
    if hasattr(adapters, "over"):
        return adapters.over(base, slots)
    kind = {"linear": AdaptedLinear, "conv2d": AdaptedConv2d, "embedding": AdaptedEmbedding}[kind_of(base)]
    return kind(base, adapters, slots)


def _in_one_dtype(adapters: Sequence[LoraWeights | None], base: torch.dtype) -> list[LoraWeights | None]:
    """Convert the adapters to the one dtype in which they run beside a layer of dtype ``base``.

    That is ``base`` if it is float64 or all adapters have it, else float32. PEFT runs each adapter in its own dtype. No
    adapter loses precision here, except a float64 one beside a layer whose results are rounded anyway.
    """
    weights = [w for w in adapters if w is not None]
    dtype = base if base == torch.float64 or all(w.a.dtype == base for w in weights) else torch.float32
    return [w if w is None or w.a.dtype == dtype else _to(w, dtype) for w in adapters]


def _to(weights: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    bias = None if weights.bias is None else weights.bias.to(dtype)
    return dataclasses.replace(weights, a=weights.a.to(dtype), b=weights.b.to(dtype), bias=bias)


def _drop(x: Tensor, p: tuple[float, ...], index: Tensor | None) -> Tensor:
    """Apply dropout to ``x`` [S, *], in slot s with probability ``p[s]`` or ``p[index[s]]``."""
    p = torch.tensor(p, device=x.device)
    p = p[:-1] if index is None else p[index]
    p = p.view(-1, *[1] * (x.dim() - 1))
    return torch.where(torch.rand(x.shape, device=x.device) >= p, x / (1 - p).to(x.dtype), 0)


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    lora: PackedLora
    biases: Tensor | None  # [T + 1, N]


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
        if p is None:
            y = multi_lora(x, self._weight, pack.lora, self.base_layer.bias, mode=mode, index=index)
        else:
            y = self._dropped(x.expand(len(tasks), *x.shape) if mode == "shared" else x, tasks, pack.lora, p, index)
        if pack.biases is None:
            return y
        biases = pack.biases[:-1] if index is None else pack.biases[index]
        return y + biases.to(y.dtype).view(y.shape[0], *[1] * (y.dim() - 2), -1)

    def _dropped(
        self, x: Tensor, tasks: tuple[int, ...], lora: PackedLora, p: tuple[float, ...], index: Tensor | None
    ) -> Tensor:
        """Run ``x`` [S, *, K] through the adapters with dropout, and through the base layer without."""
        y = F.linear(x, self._weight, self.base_layer.bias)
        a, b = (F.pad(padded, (0, 0, 0, 0, 0, 1)) for padded in lora.padded())  # [T + 1, R, ·], the last one zeros
        index = torch.arange(x.shape[0], device=x.device) if index is None else index
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        dropped = _drop(x, p, index).to(a.dtype)
        hidden = torch.bmm(dropped, a[index].transpose(1, 2))
        if any(weights and weights.taken_out for weights in self.adapters):
            kept = torch.bmm(x.to(a.dtype), a[index].transpose(1, 2))
            hidden = torch.where(self._taken_out(tasks, lora)[index, None], kept, hidden)
        hidden = hidden * F.pad(lora.scales, (0, 1))[index].view(-1, 1, 1)
        return (y + torch.bmm(hidden, b[index]).view(y.shape)).to(y.dtype)

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
        adapters = _in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
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
        return PackedLinear(lora, self._biases(tasks, width_out, like))

    def part(self, every: PackedLinear, tasks: tuple[int, ...]) -> PackedLinear:
        lora, first, end = every.lora, tasks[0], tasks[-1] + 1
        rows = slice(sum(lora.ranks[:first]), sum(lora.ranks[:end]))
        ranks, scales = lora.ranks[first:end], lora.scales[first:end]
        lora = PackedLora(lora.a[rows], lora.b[rows], ranks, lora.offsets[first : end + 1] - rows.start, scales)
        return PackedLinear(lora, None if every.biases is None else every.biases[first : end + 1])


def _layout(ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a pack's offsets and scales as tensors."""
    with torch.inference_mode(False):
        offsets = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32, device=device)
        return offsets, torch.tensor(scales, dtype=torch.float32, device=device)


# A CUDA graph cannot hold copies from the host, so these tensors are made once and kept.
_kept_layout = functools.lru_cache(maxsize=1024)(_layout)


@dataclasses.dataclass(frozen=True)
class PackedConv2d:
    a: Tensor  # [T + 1, R, C, kh, kw]; the last one is zeros, for index -1
    b: Tensor  # [T + 1, N, R], scaled
    biases: Tensor | None  # [T + 1, N]

    def of(self, index: Tensor | slice) -> PackedConv2d:
        return PackedConv2d(self.a[index], self.b[index], None if self.biases is None else self.biases[index])


EACH_TASK = slice(None, -1)


class AdaptedConv2d(Adapted):
    """Runs a convolution: the base once, the shrink of all tasks as one (grouped) convolution, the expand as one bmm.

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
        """Run ``x`` [S, B, C, H, W] with separate weights for each slot."""
        base = self.base(x)
        x = x if p is None else _drop(x, p, index)
        hidden = self._shrink(x.transpose(0, 1).flatten(1, 2), pack.a, x.shape[0])  # on [B, S·C, H, W]
        return self._expand(base, hidden, pack)

    def _shrink(self, x: Tensor, a: Tensor, groups: int) -> Tensor:
        """Convolve ``x``, which has the slots' channels side by side or one set for all → [B, S·R, H, W]."""
        base = self.base_layer
        return F.conv2d(x.to(a.dtype), a.flatten(0, 1), None, base.stride, base.padding, 1, groups)

    @staticmethod
    def _expand(base: Tensor, hidden: Tensor, pack: PackedConv2d) -> Tensor:
        """Return ``base`` [S, B, N, H, W] + b [S, N, R] · ``hidden`` [B, S·R, H, W]."""
        slots, batch = base.shape[:2]
        hidden = hidden.unflatten(1, (slots, -1)).transpose(0, 1).flatten(0, 1).flatten(2)  # [S·B, R, H·W]
        b = pack.b[:, None].expand(-1, batch, -1, -1).flatten(0, 1).to(hidden.dtype)
        # The sum is taken in the adapters' dtype and rounded once to the base layer's, as in PEFT.
        y = torch.baddbmm(base.to(hidden.dtype).flatten(3).flatten(0, 1), b, hidden).view(base.shape)
        if pack.biases is not None:
            y = y + pack.biases[:, None, :, None, None]
        return y.to(base.dtype)

    def part(self, every: PackedConv2d, tasks: tuple[int, ...]) -> PackedConv2d:
        rank = max(0 if self.adapters[t] is None else self.adapters[t].a.shape[0] for t in tasks)
        of = slice(tasks[0], tasks[-1] + 2)
        return PackedConv2d(
            every.a[of, :rank], every.b[of, :, :rank], None if every.biases is None else every.biases[of]
        )

    def pack(self, tasks: tuple[int, ...]) -> PackedConv2d:
        adapters = _in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
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
            b.append(F.pad(_dense(weights, self.base_layer.groups) * weights.scale, (0, missing)))
        return PackedConv2d(torch.stack(a), torch.stack(b), self._biases(tasks, width, like))


def _dense(weights: LoraWeights, groups: int) -> Tensor:
    """Return B as a matrix [N, r], also if it is the weight [N, r / groups, 1, 1] of a grouped 1×1 convolution."""
    b = weights.b.flatten(1)
    if b.shape[1] == weights.a.shape[0]:
        return b
    return torch.block_diag(*b.unflatten(0, (groups, -1)))  # the blocks are [N / G, r / G]


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

    def _add(self, base: Tensor, x: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
        if weights is None:
            return base
        table, up = weights
        return (base + F.embedding(x, table, self.base_layer.padding_idx) @ up).to(base.dtype)

    def pack(self, tasks: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """Return each adapter's table [V, r] and its scaled rows [r, N]."""
        adapters = _in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
        return [None if w is None else (w.a.t().contiguous(), w.b.t() * w.scale) for w in adapters]

    def part(self, every: list, tasks: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        return every[tasks[0] : tasks[-1] + 1]
