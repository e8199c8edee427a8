from torch import Tensor

from ._library import define

# intra = M V and inter = (1 − M) V with M = sigmoid(scale · q kᵀ), both divided by N where `mean`. q, k [B, N, K],
# v [B, N, D]; the results have the shape and dtype of v.
_AFFINITY_ATTENTION = "(Tensor q, Tensor k, Tensor v, float scale, bool mean) -> (Tensor intra, Tensor inter)"


def _affinity_attention_fake(q, k, v, scale, mean) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape)


define("affinity_attention", _AFFINITY_ATTENTION, _affinity_attention_fake)

_AFFINITY_ATTENTION_BACKWARD = (
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor v, float scale, bool mean) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def _affinity_attention_backward_fake(dintra, dinter, q, k, v, scale, mean) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


define("affinity_attention_backward", _AFFINITY_ATTENTION_BACKWARD, _affinity_attention_backward_fake)
