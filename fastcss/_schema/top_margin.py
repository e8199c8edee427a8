import torch
from torch import Tensor

from ._library import raw_op


# logits [B, C, N], C ≥ 2; labels int64 [B, N] or empty: then each pixel's own largest logit. rival int64: the largest
# of the others. margin = z_true − z_rival, p_true and p_rival their softmax, curvature = (p_t + p_r) − (p_t − p_r)²:
# all [B, N] in the dtype of logits. For the backward pass true int64 [B, N] and p_first float32 [B, N], the softmax of
# the largest logit, which is one of the two. An ignored pixel: rival and true -1, the rest 0. A label outside of the
# classes: rival and true -1, the rest NaN.
@raw_op(
    "(Tensor logits, Tensor labels, int ignore_index) -> (Tensor margin, Tensor rival, Tensor p_true, Tensor p_rival, "
    "Tensor curvature, Tensor true, Tensor p_first)",
    flops=None,
)
def top_margin(logits, labels, ignore_index) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], logits.shape[2])
    dtypes = (logits.dtype, torch.int64, *(logits.dtype,) * 3, torch.int64, torch.float32)
    return tuple(logits.new_empty(shape, dtype=dtype) for dtype in dtypes)


@raw_op(
    "(Tensor dmargin, Tensor dp_true, Tensor dp_rival, Tensor dcurvature, Tensor logits, Tensor true, Tensor rival, "
    "Tensor p_first) -> Tensor",
    flops=None,
)
def top_margin_backward(dmargin, dp_true, dp_rival, dcurvature, logits, true, rival, p_first) -> Tensor:
    return logits.new_empty(logits.shape)
