import math

import torch
from torch import Tensor

from ._library import raw_op


# logits [B, C, N], feats [B, N, D] → centers float32 [B, C, D] = Σ_n w_cn f_n, w = exp(logits − pixel_lse − class_lse):
# pixel_lse [B, 2, N] is Σ over the classes where over_classes (else empty, 0), class_lse [B, 2, C] then over the
# pixels. Each is two numbers that add up to log Σ exp: the largest, and the logarithm of Σ exp(… − largest).
@raw_op(
    "(Tensor logits, Tensor feats, bool over_classes) -> (Tensor centers, Tensor class_lse, Tensor pixel_lse)",
    flops=lambda logits, feats, *_: 2 * math.prod(logits) * feats[2],
)
def class_centers(logits, feats, over_classes) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    class_lse = logits.new_empty((batch, 2, classes), dtype=torch.float32)
    pixel_lse = logits.new_empty((batch, 2, pixels) if over_classes else (0,), dtype=torch.float32)
    centers = feats.new_empty((batch, classes, feats.shape[2]), dtype=torch.float32)
    return centers, class_lse, pixel_lse


@raw_op(
    "(Tensor dcenters, Tensor logits, Tensor feats, Tensor centers, Tensor class_lse, Tensor pixel_lse) "
    "-> (Tensor dlogits, Tensor dfeats)",
    flops=lambda dcenters, logits, feats, *_: 4 * math.prod(logits) * feats[2],
)
def class_centers_backward(dcenters, logits, feats, centers, class_lse, pixel_lse) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), feats.new_empty(feats.shape)
