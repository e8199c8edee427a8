"""Runs a convolution with all its adapters."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapted_layer import Adapted, drop, in_one_dtype
from .dora import output_scales
from .read_adapters import LoraWeights


@dataclasses.dataclass(frozen=True)
class PackedConv2d:
    a: Tensor  # [T + 1, R, C, kh, kw]; the last one is zeros, for index -1
    b: Tensor  # [T + 1, N, R], scaled
    biases: Tensor | None  # [T + 1, N]
    scales: Tensor | None  # [T + 1, N], DoRA's

    def of(self, index: Tensor | slice) -> PackedConv2d:
        biases, scales = (t if t is None else t[index] for t in (self.biases, self.scales))
        return PackedConv2d(self.a[index], self.b[index], biases, scales)


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
        base = self._base(x)
        hidden = self._shrink(x, pack.a, 1)
        return self._expand(base.expand(len(tasks), *base.shape), hidden, pack)

    def diverged(self, x: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._each(x, self.packed(tasks).of(EACH_TASK), self._dropout(tasks), None)

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        return self._each(x, self.packed(self._all()).of(index), self._dropout(self._all()), index)

    def _each(self, x: Tensor, pack: PackedConv2d, p: tuple[float, ...] | None, index: Tensor | None) -> Tensor:
        """Run ``x`` [S, B, C, H, W] with separate weights for each slot."""
        base, of_dropped = self._base(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None
        if p is not None:
            x = drop(x, p, index)
            of_dropped = None if pack.scales is None else self._without_bias(x)
        hidden = self._shrink(x.transpose(0, 1).flatten(1, 2), pack.a, x.shape[0])  # on [B, S·C, H, W]
        return self._expand(base, hidden, pack, of_dropped)

    def _base(self, x: Tensor) -> Tensor:
        """Run the base layer; without its bias where the adapters' biases hold what replaces it."""
        layer = self.base_layer
        return layer._conv_forward(x, layer.weight, None) if self.replaces_bias else layer(x)

    def _without_bias(self, x: Tensor) -> Tensor:
        base = self.base_layer
        y = F.conv2d(x.flatten(0, 1), base.weight, None, base.stride, base.padding, base.dilation, base.groups)
        return y.unflatten(0, x.shape[:2])

    def _shrink(self, x: Tensor, a: Tensor, groups: int) -> Tensor:
        """Convolve ``x``, which has the slots' channels side by side or one set for all → [B, S·R, H, W]."""
        base = self.base_layer
        return F.conv2d(x.to(a.dtype), a.flatten(0, 1), None, base.stride, base.padding, 1, groups)

    def _expand(self, base: Tensor, hidden: Tensor, pack: PackedConv2d, of_dropped: Tensor | None = None) -> Tensor:
        """Return ``base`` [S, B, N, H, W] + b [S, N, R] · ``hidden`` [B, S·R, H, W].

        DoRA scales that without the base layer's bias; in training its part of the base layer is of a dropped input.
        """
        slots, batch = base.shape[:2]
        hidden = hidden.unflatten(1, (slots, -1)).transpose(0, 1).flatten(0, 1).flatten(2)  # [S·B, R, H·W]
        b = pack.b[:, None].expand(-1, batch, -1, -1).flatten(0, 1).to(hidden.dtype)
        # The sum is taken in the adapters' dtype and rounded once to the base layer's, as in PEFT.
        if pack.scales is None:
            y = torch.baddbmm(base.to(hidden.dtype).flatten(3).flatten(0, 1), b, hidden).view(base.shape)
        else:
            if of_dropped is None:
                bias = None if self.replaces_bias else self.base_layer.bias
                of_dropped = base if bias is None else base - bias[:, None, None]
            scales = pack.scales[:, None, :, None, None]
            y = base + of_dropped * (scales - 1) + torch.bmm(b, hidden).view(base.shape) * scales
        if pack.biases is not None:
            y = y + pack.biases[:, None, :, None, None]
        return y.to(base.dtype)

    def part(self, every: PackedConv2d, tasks: tuple[int, ...]) -> PackedConv2d:
        rank = max(0 if self.adapters[t] is None else self.adapters[t].a.shape[0] for t in tasks)
        of = slice(tasks[0], tasks[-1] + 2)
        biases, scales = (t if t is None else t[of] for t in (every.biases, every.scales))
        return PackedConv2d(every.a[of, :rank], every.b[of, :, :rank], biases, scales)

    def pack(self, tasks: tuple[int, ...]) -> PackedConv2d:
        adapters = in_one_dtype([self.adapters[t] for t in tasks], self.base_layer.weight.dtype)
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
        scales = output_scales(adapters[: len(tasks)], self.base_layer, like)
        return PackedConv2d(torch.stack(a), torch.stack(b), self._biases(tasks, width, like), scales)


def _dense(weights: LoraWeights, groups: int) -> Tensor:
    """Return B as a matrix [N, r], also if it is the weight [N, r / groups, 1, 1] of a grouped 1×1 convolution."""
    b = weights.b.flatten(1)
    if b.shape[1] == weights.a.shape[0]:
        return b
    return torch.block_diag(*b.unflatten(0, (groups, -1)))  # the blocks are [N / G, r / G]
