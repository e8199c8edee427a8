"""Turns cost maps into logits by refinement over space, refinement over classes, and guided upsampling.

Maps are ``[B, k, …]``, one for each kept class. Guidance is joined to them along the channels before a linear map W.
Since W [x; g] = W_x x + W_g g, the term of a guidance that classes or pixels have in common is computed once for all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._resize import resize


class GuidedLinear(nn.Linear):
    """Applies ``nn.Linear`` to ``[x; guidance]``; the guidance broadcasts to x in all dimensions but the last."""

    def __init__(self, channels: int, guidance_channels: int, out_channels: int) -> None:
        super().__init__(channels + guidance_channels, out_channels)
        self.parts = (channels, guidance_channels)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:  # type: ignore[override]  # the weights' layout alone
        own, shared = self.weight.split(self.parts, dim=1)
        return F.linear(x, own, self.bias) + F.linear(guidance, shared)


class GuidedConv(nn.Conv2d):
    """Convolves ``[x; guidance]`` by 3×3, with x ``[B, k, C, H, W]`` and guidance ``[B, G, H, W]`` or None."""

    def __init__(self, channels: int, guidance_channels: int, out_channels: int) -> None:
        super().__init__(channels + guidance_channels, out_channels, 3, padding=1, bias=False)
        self.parts = (channels, guidance_channels)

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:  # type: ignore[override]
        own, shared = self.weight.split(self.parts, dim=1)
        maps = F.conv2d(x.flatten(0, 1), own, padding=1).unflatten(0, x.shape[:2])
        return maps if guidance is None else maps + F.conv2d(guidance, shared, padding=1).unsqueeze(1)


class SpatialRefinement(nn.Module):
    """Runs a pair of Swin blocks, the second in shifted windows, on the map of each class; eq. 5.7.

    As in CAT-Seg, the normalised visual guidance is joined to the input of queries and keys but not of values, and
    there is no position bias.

    Args:
        channels: C, channels of the maps and of the guidance.
        heads: heads of the attention; a divisor of C.
        window: pixels on a side of a window.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.guidance_norm = nn.LayerNorm(channels)
        self.blocks = nn.ModuleList([WindowBlock(channels, heads, window, shifted) for shifted in (False, True)])

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Refine ``x`` [B, k, H, W, C] by ``guidance`` [B, H, W, C] → [B, k, H, W, C]."""
        guidance = self.guidance_norm(guidance).unsqueeze(1)
        for block in self.blocks:
            x = block(x, guidance)
        return x


class WindowBlock(nn.Module):
    def __init__(self, channels: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.norm = nn.LayerNorm(channels)
        self.query_key = GuidedLinear(channels, channels, 2 * channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.mlp = mlp(channels, nn.GELU())

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        normed = self.norm(x)
        qkv = torch.cat([self.query_key(normed, guidance), self.value(normed)], dim=-1)
        attended = window_attention(qkv.flatten(0, 1), self.heads, self.window, self.shifted)
        x = x + self.out(attended).unflatten(0, x.shape[:2])
        return x + self.mlp(x)


class ClassRefinement(nn.Module):
    """Runs a transformer block with linear attention (φ = elu + 1) over the classes, at each pixel by itself; eq. 5.8.

    The text guidance is joined to the input of queries and keys. CAT-Seg first pools the maps, to save time with 256
    classes, and adds the result to the maps. Here nothing is pooled, and the block has only its own residuals.

    Args:
        channels: C, channels of the maps and of the guidance.
        heads: heads of the attention; a divisor of C.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query_key = GuidedLinear(channels, channels, 2 * channels)
        self.value = nn.Linear(channels, channels)
        self.mlp = mlp(channels, nn.ReLU())

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """Refine ``x`` [B, k, H, W, C] by ``guidance`` [B, k, C] → [B, k, H, W, C], whatever the order of the k."""
        normed = self.norm(x)
        query, key = (F.elu(self.query_key(normed, guidance[:, :, None, None])) + 1).chunk(2, dim=-1)
        x = x + class_attention(query, key, self.value(normed), self.heads)
        return x + self.mlp(x)


class GuidedUpsampling(nn.Module):
    """Doubles the maps' size: a transposed convolution, joined with visual guidance, two 3×3 convolutions; eq. 5.9.

    Args:
        channels: C, channels of the maps; a quarter of the joined channels come from the guidance.
        out_channels: channels of the result.
        guidance_channels: G, channels of the guidance; 0 if there is none.
    """

    def __init__(self, channels: int, out_channels: int, guidance_channels: int) -> None:
        super().__init__()
        projected = channels // 4 if guidance_channels else 0
        self.projection = conv_relu(guidance_channels, projected) if guidance_channels else None
        self.up = nn.ConvTranspose2d(channels, channels - projected, 2, stride=2)
        self.join = GuidedConv(channels - projected, projected, out_channels)
        conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.rest = nn.Sequential(*_norm_relu(out_channels), conv, *_norm_relu(out_channels))

    def forward(self, x: Tensor, guidance: Tensor | None) -> Tensor:
        """Upsample ``x`` [B, k, C, H, W] by ``guidance`` [B, G, h, w] or None → [B, k, C′, 2H, 2W]."""
        x = self.up(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.projection is not None:
            guidance = resize(self.projection(guidance), x.shape[3:])
        return self.rest(self.join(x, guidance).flatten(0, 1)).unflatten(0, x.shape[:2])


def class_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Compute linear attention, Q (Kᵀ V) / (Q Kᵀ 1) with Q and K above 0, over the k of ``[B, k, H, W, C]``.

    Both sums over classes are taken as means. The factor cancels, and float16 stays in range.
    """
    query, key, value = (x.unflatten(-1, (heads, -1)).movedim(1, -2) for x in (query, key, value))  # [B, H, W, h, k, d]
    context = key.mT @ (value / value.shape[-2])  # [B, H, W, h, d, d]
    total = query @ key.mean(dim=-2).unsqueeze(-1)  # [B, H, W, h, k, 1]
    return (query @ context / (total + 1e-6)).movedim(-2, 1).flatten(-2)


class Axis(NamedTuple):
    """Says how the windows lie along one side of a map."""

    size: int
    window: int
    padded: int  # the size rounded up to whole windows
    shift: int


def window_attention(qkv: Tensor, heads: int, window: int, shifted: bool) -> Tensor:
    """Attend within windows of ``[N, H, W, 3C]`` → ``[N, H, W, C]``, as Swin does, for any H and W.

    A map smaller than a window is one window, unshifted. The last windows are filled up with pixels that no real pixel
    attends to.
    """
    rows, columns = (_axis(size, window, shifted) for size in qkv.shape[1:3])
    x = F.pad(qkv, (0, 0, 0, columns.padded - columns.size, 0, rows.padded - rows.size))
    x = x.roll((-rows.shift, -columns.shift), dims=(1, 2))
    x = x.unflatten(3, (3, heads, -1)).unflatten(2, (-1, columns.window)).unflatten(1, (-1, rows.window))
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, N, down, across, heads, window, window, d]
    grid, pixels = x.shape[2:5], x.shape[5:7]
    query, key, value = x.flatten(5, 6).flatten(2, 4)  # [N, windows · heads, pixels, d]
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=_mask(rows, columns, heads, qkv.device))
    x = x.unflatten(2, pixels).unflatten(1, grid).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # [N, padded, padded, C]
    return x.roll((rows.shift, columns.shift), dims=(1, 2))[:, : rows.size, : columns.size]


def _axis(size: int, window: int, shifted: bool) -> Axis:
    window = min(window, size)
    return Axis(size, window, math.ceil(size / window) * window, window // 2 if shifted and window < size else 0)


def _mask(rows: Axis, columns: Axis, heads: int, device: torch.device) -> Tensor | None:
    """Return which pixel attends to which in a window, bool [1, windows · heads, pixels, pixels]; None if all do."""
    if all(axis.shift == 0 and axis.padded == axis.size for axis in (rows, columns)):
        return None
    down, across = (_same_region(axis, device) for axis in (rows, columns))
    both = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]
    both = both.flatten(4, 5).flatten(2, 3)  # [down, across, pixels, pixels]
    return both.unsqueeze(2).expand(-1, -1, heads, -1, -1).flatten(0, 2).unsqueeze(0)


def _same_region(axis: Axis, device: torch.device) -> Tensor:
    """Return which positions of a window lie in the same region, bool [windows, window, window].

    The last window of a shifted map has pixels of both ends, which are no neighbours. Filling is a region too: a row
    that attends to nothing would be NaN.
    """
    place = torch.arange(axis.padded, device=device) + axis.shift
    wrapped, filling = place >= axis.padded, place % axis.padded >= axis.size
    region = (wrapped + 2 * filling).view(-1, axis.window)
    return region[:, :, None] == region[:, None, :]


def mlp(channels: int, activation: nn.Module) -> nn.Sequential:
    """Make a normalisation and two linear layers with four times the channels between them."""
    wide = 4 * channels
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, wide), activation, nn.Linear(wide, channels))


def conv_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True))


def _norm_relu(channels: int) -> tuple[nn.GroupNorm, nn.ReLU]:
    """Make a group norm with groups of 16 channels, or of more if 16 does not divide them, and a ReLU."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels), nn.ReLU(inplace=True)
