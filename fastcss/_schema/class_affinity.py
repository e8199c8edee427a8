import torch
from torch import Tensor

from ._library import define

# feats [B, N, D], centers [B, C, D]; with P = feats centersᵀ, intra and inter [B, N, D] are
# softmax(½ (Σ_n P ± T P)) centers. tp = T P [B, N, C] float32, T = tanh(½ scale · q kᵀ), is what the backward pass
# wants of it; empty unless save_tp.
_CLASS_AFFINITY = (
    "(Tensor q, Tensor k, Tensor feats, Tensor centers, float scale, bool mean, bool save_tp) "
    "-> (Tensor intra, Tensor inter, Tensor tp)"
)


def _class_affinity_fake(q, k, feats, centers, scale, mean, save_tp) -> tuple[Tensor, Tensor, Tensor]:
    tp = (*feats.shape[:2], centers.shape[1]) if save_tp else (0,)
    return feats.new_empty(feats.shape), feats.new_empty(feats.shape), feats.new_empty(tp, dtype=torch.float32)


define("class_affinity", _CLASS_AFFINITY, _class_affinity_fake)

_CLASS_AFFINITY_BACKWARD = (
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor feats, Tensor centers, Tensor tp, "
    "float scale, bool mean) -> (Tensor dq, Tensor dk, Tensor dfeats, Tensor dcenters)"
)


def _class_affinity_backward_fake(
    dintra, dinter, q, k, feats, centers, tp, scale, mean
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, feats, centers))


define("class_affinity_backward", _CLASS_AFFINITY_BACKWARD, _class_affinity_backward_fake)
