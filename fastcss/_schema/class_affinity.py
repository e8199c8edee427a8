import torch
from torch import Tensor

from ._library import raw_op


def _flops(q, k, feats, centers, scale, mean, save_tp) -> int:
    batch, pixels, width = q
    classes, channels = centers[1:]
    return 2 * batch * (pixels**2 * (width + classes) + 3 * pixels * channels * classes)


# feats [B, N, D], centers [B, C, D]; with P = feats centersᵀ, intra and inter [B, N, D] are
# softmax(½ (Σ_n P ± T P)) centers. tp = T P [B, N, C] float32, T = tanh(½ scale · q kᵀ), is what the backward pass
# wants of it; empty unless save_tp.
@raw_op(
    "(Tensor q, Tensor k, Tensor feats, Tensor centers, float scale, bool mean, bool save_tp) "
    "-> (Tensor intra, Tensor inter, Tensor tp)",
    flops=_flops,
)
def class_affinity(q, k, feats, centers, scale, mean, save_tp) -> tuple[Tensor, Tensor, Tensor]:
    tp = (*feats.shape[:2], centers.shape[1]) if save_tp else (0,)
    return feats.new_empty(feats.shape), feats.new_empty(feats.shape), feats.new_empty(tp, dtype=torch.float32)


def _backward_flops(dintra, dinter, q, k, feats, centers, tp, scale, mean) -> int:
    batch, pixels, width = q
    classes, channels = centers[1:]
    return 2 * batch * (pixels**2 * (3 * width + 2 * classes) + 6 * pixels * channels * classes)


@raw_op(
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor feats, Tensor centers, Tensor tp, "
    "float scale, bool mean) -> (Tensor dq, Tensor dk, Tensor dfeats, Tensor dcenters)",
    flops=_backward_flops,
)
def class_affinity_backward(
    dintra, dinter, q, k, feats, centers, tp, scale, mean
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, feats, centers))
