import math

import torch
from torch import Tensor

from ._library import raw_op

# Logits less the largest of them are clamped to this, which float16 can still count.
LEAST = -50000.0


# q, v_image [B, N, heads, D], k, v_text [B, L, heads, D]; text_mask bool [B, L], image_mask bool [B, N], True where a
# token is not read; each `group` samples in turn share one largest logit. → image [B, N, heads · D], text
# [B, L, heads · D] and, in float32 for the backward pass:
# - floor [B, 2], what a logit s counts as, t = max(s - floor[0], floor[1]): (largest logit, LEAST) for the samples of a
#   group in which one is below that, else (0, -inf);
# - image_stats [B, heads, N, 2] and text_stats [B, heads, L, 2], for each softmax the largest t that it reads and the
#   logarithm of Σ e^(t - largest). One number for both would lose what a large t leaves of the logarithm.
@raw_op(
    "(Tensor q, Tensor k, Tensor v_image, Tensor v_text, Tensor? text_mask, Tensor? image_mask, float scale, "
    "SymInt group) -> (Tensor image, Tensor text, Tensor image_stats, Tensor text_stats, Tensor floor)",
    flops=lambda q, k, *_: 6 * math.prod(q) * k[1],
)
def bi_attention(
    q, k, v_image, v_text, text_mask, image_mask, scale, group
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, pixels, heads, width = q.shape
    length = k.shape[1]
    image, text = (q.new_empty(batch, tokens, heads * width) for tokens in (pixels, length))
    stats = (q.new_empty((batch, heads, tokens, 2), dtype=torch.float32) for tokens in (pixels, length))
    return image, text, *stats, q.new_empty((batch, 2), dtype=torch.float32)


@raw_op(
    "(Tensor dimage, Tensor dtext, Tensor q, Tensor k, Tensor v_image, Tensor v_text, Tensor? text_mask, "
    "Tensor? image_mask, Tensor text, Tensor image_stats, Tensor text_stats, Tensor floor, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv_image, Tensor dv_text)",
    flops=lambda dimage, dtext, q, k, *_: 14 * math.prod(q) * k[1],
)
def bi_attention_backward(
    dimage, dtext, q, k, v_image, v_text, text_mask, image_mask, text, image_stats, text_stats, floor, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v_image, v_text))
