"""Runs SDPA on the windows. Only the last row and the last column of windows hold tokens that are not neighbours, so
there are four kinds of windows with one mask each, where the model has a mask for each window."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._dispatch.private_apis import forward_mode, is_wrapped


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    pad_key: Tensor,
    pad_value: Tensor,
    window: int,
    shift: int,
    scale: float,
) -> Tensor:
    """``q``, ``k``, ``v`` [B, H, W, heads, D], ``bias`` [heads, w², w²], pads [B, heads, D] → [B, H, W, heads · D]."""
    height, width = q.shape[1:3]
    rolled = [_windows(x, pad, window, shift) for x, pad in ((q, None), (k, pad_key), (v, pad_value))]

    def attend(rows: slice, columns: slice, last_row: bool, last_column: bool) -> Tensor:
        mask = bias if not last_row | last_column else bias + _mask(window, shift, last_row, last_column, bias)
        parts = [x[:, rows, columns].flatten(0, 2) for x in rolled]
        with _kernels(q, k, v, bias, pad_key, pad_value):
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask[None].to(q.dtype), scale=scale)
        return out.unflatten(0, rolled[0][:, rows, columns].shape[:3])

    whole, inner, last = slice(None), slice(None, -1), slice(-1, None)
    if shift:
        across = [
            torch.cat([attend(rows, inner, low, False), attend(rows, last, low, True)], dim=2)
            for rows, low in ((inner, False), (last, True))
        ]
        out = torch.cat(across, dim=1)
    else:
        out = attend(whole, whole, False, False)
    out = out.transpose(3, 4).flatten(4).unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.roll((shift, shift), dims=(1, 2))[:, :height, :width]


def _kernels(*tensors: Tensor) -> AbstractContextManager:
    """Select SDPA's composed kernel under torch.func, and otherwise leave the choice to torch.

    Under torch.func torch's fused kernels do not see that a bias needs its gradient, and they have no tangents. The
    composed kernel has both.
    """
    mapped = forward_mode() or (not torch.compiler.is_compiling() and any(is_wrapped(tensor) for tensor in tensors))
    return sdpa_kernel(SDPBackend.MATH) if mapped else nullcontext()


def _windows(x: Tensor, pad: Tensor | None, window: int, shift: int) -> Tensor:
    """Cut the map into windows: [B, H, W, heads, D] → [B, rows, columns, heads, window², D]."""
    height, width = x.shape[1:3]
    below, right = -height % window, -width % window
    if pad is None:
        x = F.pad(x, (0, 0, 0, 0, 0, right, 0, below))
    else:
        x = torch.cat([x, pad[:, None, None].expand(-1, height, right, -1, -1)], dim=2)
        x = torch.cat([x, pad[:, None, None].expand(-1, below, width + right, -1, -1)], dim=1)
    x = x.roll((-shift, -shift), dims=(1, 2)).unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).transpose(3, 4)


def _mask(window: int, shift: int, last_row: bool, last_column: bool, like: Tensor) -> Tensor:
    """Return -100 between the tokens of a last window that come from two ends of the map: [window², window²]."""
    wrapped = torch.arange(window, device=like.device) >= window - shift
    none = torch.zeros_like(wrapped)
    region = 2 * (wrapped if last_row else none)[:, None].long() + (wrapped if last_column else none).long()
    return (region.flatten()[:, None] != region.flatten()).to(like.dtype) * -100
