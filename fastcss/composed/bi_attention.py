"""Reads some image tokens at a time in two sweeps (largest logits, then both softmaxes), and never keeps all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._schema.bi_attention import LEAST
from ._row_chunks import row_chunks


def bi_attention(
    q: Tensor,
    k: Tensor,
    v_image: Tensor,
    v_text: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``q``, ``v_image`` [B, N, heads, D], ``k``, ``v_text`` [B, L, heads, D] → two of [B, ·, heads · D]."""
    batch, pixels, heads, _ = q.shape
    length, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    read_image = q.new_ones((batch, pixels), dtype=torch.bool) if image_mask is None else ~image_mask
    read_text = q.new_ones((batch, length), dtype=torch.bool) if text_mask is None else ~text_mask
    wide_k, wide_v = (tensor.to(dtype).transpose(1, 2) for tensor in (k, v_text))  # [B, heads, L, D]

    def logits(q: Tensor, k: Tensor) -> Tensor:
        return (q.to(dtype) * scale).transpose(1, 2) @ k.transpose(2, 3)  # [B, heads, rows, L]

    def largest(q: Tensor, read: Tensor, k: Tensor) -> Tensor:
        s = logits(q, k)
        masked = s.masked_fill(~read[:, None, :, None], -torch.inf)
        return torch.stack([s.amax(dim=2), masked.amax(dim=2)])

    def attend(q: Tensor, v_image: Tensor, read: Tensor, k: Tensor, v_text: Tensor, peak: Tensor, most: Tensor):
        s = (logits(q, k) - peak).clamp(min=LEAST)
        image = s.masked_fill(~read_text[:, None, None], -torch.inf).softmax(dim=3) @ v_text
        # Logits are masked before the exponential, which overflows for a masked logit far above the others.
        masked = s.masked_fill(~read[:, None, :, None], -torch.inf)
        weights = (masked - most[:, :, None]).exp().transpose(2, 3)
        return image.transpose(1, 2), weights @ v_image.to(dtype).transpose(1, 2), weights.sum(dim=3)

    columns = heads * length
    if not batch * pixels * columns:  # one side or both have nothing to read, and no large tensor arises
        image, text = (x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0) for x in (q, k))
        image, text = image + v_text.sum(dim=1, keepdim=True), text + v_image.sum(dim=1, keepdim=True)
        return image.flatten(2), text.flatten(2)
    with torch.no_grad():
        peaks = torch.stack([*row_chunks(largest, (q, read_image), (wide_k,), columns)]).amax(dim=0)
        peaks = peaks.detach()  # no_grad lets tangents through
        peak = peaks[0].max()
        most = (peaks[1] - peak).clamp(min=LEAST)  # [B, heads, L]
    parts = row_chunks(attend, (q, v_image, read_image), (wide_k, wide_v, peak, most), columns)
    image, text, total = zip(*parts, strict=True)
    text = sum(text) / sum(total)[..., None]
    return torch.cat(image, dim=1).flatten(2).to(q.dtype), text.transpose(1, 2).flatten(2).to(q.dtype)
