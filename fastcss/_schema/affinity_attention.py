from torch import Tensor

from ._library import raw_op


def _flops(q, k, v, scale, mean) -> int:
    batch, pixels, width = q
    return 2 * batch * pixels**2 * (width + v[2])


# intra = M V and inter = (1 − M) V with M = sigmoid(scale · q kᵀ), both divided by N where `mean`. q, k [B, N, K],
# v [B, N, D]; the results have the shape and dtype of v.
@raw_op("(Tensor q, Tensor k, Tensor v, float scale, bool mean) -> (Tensor intra, Tensor inter)", flops=_flops)
def affinity_attention(q, k, v, scale, mean) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape)


def _backward_flops(dintra, dinter, q, k, v, scale, mean) -> int:
    batch, pixels, width = q
    return 2 * batch * pixels**2 * (3 * width + 2 * v[2])


@raw_op(
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor v, float scale, bool mean) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    flops=_backward_flops,
)
def affinity_attention_backward(dintra, dinter, q, k, v, scale, mean) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
