import torch
from torch import Tensor

from ._library import raw_op


def _flops(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2) -> int:
    return 4 * x[0] * weight1[0] * weight1[1]


# x + gelu(norm(x) W₁ᵀ + b₁) W₂ᵀ + b₂ without gradients, for _fuse/mlp.py: x [M, K], W₁ [H, K], W₂ [K, H], all
# float32, or all bfloat16 where the CPU multiplies that.
@raw_op(
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight1, Tensor? bias1, Tensor weight2, "
    "Tensor? bias2) -> Tensor",
    flops=_flops,
)
def mlp(x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2) -> Tensor:
    return torch.empty_like(x)
