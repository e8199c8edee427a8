"""Computes one matrix of logits and both of its softmaxes, as transformers' module does between its linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .._schema.bi_attention import LEAST


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
    q, k, v_image, v_text = (tensor.transpose(1, 2) for tensor in (q * scale, k, v_image, v_text))
    logits = q @ k.transpose(2, 3)  # [B, heads, N, L]
    if logits.numel():
        # The maximum is a constant to the gradient, because a softmax does not depend on a shift of all its logits.
        logits = (logits - logits.detach().max()).clamp(min=LEAST, max=-LEAST)
    of_text = logits.transpose(2, 3)
    if logits.numel():
        of_text = (of_text - of_text.detach().amax(dim=3, keepdim=True)).clamp(min=LEAST, max=-LEAST)
    if image_mask is not None:
        of_text = of_text.masked_fill(image_mask[:, None, None], -torch.inf)
    if text_mask is not None:
        logits = logits.masked_fill(text_mask[:, None, None], -torch.inf)
    image, text = logits.softmax(dim=3) @ v_text, of_text.softmax(dim=3) @ v_image
    return image.transpose(1, 2).flatten(2), text.transpose(1, 2).flatten(2)
