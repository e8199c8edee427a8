"""Bi-directional attention between image and text: one matrix of logits, a softmax over each of its sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.autograd import Kernels, fold_vmap, once_differentiable
from .._dispatch.torch_function import one_call
from ..composed import bi_attention as composed
from ..reference import bi_attention as reference
from ._arguments import autocast, check_alike, check_device, check_number, check_shapes, no_autocast


class BiAttention(NamedTuple):
    """Holds what each side has read of the other.

    Attributes:
        image: ``[B, N, heads · D]``.
        text: ``[B, L, heads · D]``.
    """

    image: Tensor
    text: Tensor


@one_call
def bi_attention(
    q: Tensor,
    k: Tensor,
    v_image: Tensor,
    v_text: Tensor,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> BiAttention:
    """softmax over the text of ``scale`` · q kᵀ times ``v_text``, and its softmax over the image times ``v_image``.

    The ``[N, L]`` logits are never stored. As in the published model, a logit counts as no less than 50,000 below the
    largest logit of the batch. Where all of them are nearer than that, which is the rule, samples do not depend on each
    other; the largest logit is a constant to the gradient.

    Args:
        q: ``[B, N, heads, D]``, projected image tokens; float32, bfloat16 or float16 (float64 runs composed).
        k: ``[B, L, heads, D]``, projected text tokens.
        v_image: ``[B, N, heads, D]``, what the text reads.
        v_text: ``[B, L, heads, D]``, what the image reads.
        text_mask: bool ``[B, L]``, True where the image does not read a text token (padding).
        image_mask: bool ``[B, N]``, True where the text does not read an image token.
        scale: of the logits, by default 1 / √D.
        impl: "auto", or one of "reference", "composed", "cpu", "triton", "cuda", which runs or raises.

    Returns:
        ``BiAttention(image, text)``, in the dtype of ``q``; NaN where the mask leaves nothing to read. Differentiable
        once in ``q``, ``k``, ``v_image`` and ``v_text``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
        RuntimeError: the implementation asked for cannot run here; the message says why.

    Source: Grounding DINO §3.2 (feature enhancer), GLIP eq. 4; transformers' ``GroundingDinoBiMultiHeadAttention``
        between its linear layers, without dropout.

    Example:
        >>> q, k = torch.randn(1, 1000, 4, 64), torch.randn(1, 20, 4, 64)
        >>> bi_attention(q, k, torch.randn_like(q), torch.randn_like(k)).image.shape
        torch.Size([1, 1000, 256])
    """
    op = "bi_attention"
    check_shapes(
        op,
        q=(q, "B N heads D"),
        k=(k, "B L heads D"),
        v_image=(v_image, "B N heads D"),
        v_text=(v_text, "B L heads D"),
        **({} if text_mask is None else {"text_mask": (text_mask, "B L")}),
        **({} if image_mask is None else {"image_mask": (image_mask, "B N")}),
    )
    check_alike(op, q=q, k=k, v_image=v_image, v_text=v_text)
    for name, mask in (("text_mask", text_mask), ("image_mask", image_mask)):
        if mask is not None:
            check_device(op, "q", q, name, mask)
            if mask.dtype != torch.bool:
                raise TypeError(f"{op}: {name} must be bool, True where a token is not read, got {mask.dtype}")
    scale = max(1, q.shape[3]) ** -0.5 if scale is None else check_number(op, "scale", scale)
    q, k, v_image, v_text = autocast(q, k, v_image, v_text)
    impl = backends.choose(op, impl, q)
    if impl in ("reference", "composed"):
        form = composed.bi_attention if impl == "composed" else reference.bi_attention
        with no_autocast(q):
            return BiAttention(*form(q, k, v_image, v_text, text_mask, image_mask, scale))
    return BiAttention(*FORWARD[impl](q, k, v_image, v_text, text_mask, image_mask, scale, q.shape[0])[:2])


class _BiAttention(torch.autograd.Function):
    """The compiled implementations with their gradients."""

    @staticmethod
    def forward(ctx, q, k, v_image, v_text, text_mask, image_mask, scale, group, impl):
        tensors = (q, k, v_image, v_text, text_mask, image_mask)
        image, text, *statistics = FORWARD.beneath[impl](*tensors, scale, group)
        ctx.scale, ctx.impl = scale, impl
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(*tensors, text, *statistics)
        return image, text, *statistics

    @staticmethod
    def backward(ctx, dimage, dtext, *_):
        grads = BACKWARD[ctx.impl](dimage, dtext, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None, None, None


FORWARD = Kernels("bi_attention", _BiAttention, vmap=fold_vmap)
BACKWARD = once_differentiable("bi_attention_backward", vmap=fold_vmap)
