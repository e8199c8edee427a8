import math

import torch
from torch import Tensor

from ._library import raw_op


# features [B, N, D], prototypes [C, D], bias [C]. Of the k ≤ N tokens of largest score = max_c (features · prototypes_c
# + bias_c), best first, NaN above all, ties by lower token: queries [B, k, D], index int64 [B, k], score [B, k].
@raw_op(
    "(Tensor features, Tensor prototypes, Tensor? bias, SymInt k) -> (Tensor queries, Tensor index, Tensor score)",
    flops=lambda features, prototypes, *_: 2 * math.prod(features) * prototypes[0],
)
def topk_queries(features, prototypes, bias, k) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = features.shape
    index = features.new_empty((batch, k), dtype=torch.int64)
    return features.new_empty(batch, k, width), index, features.new_empty(batch, k)
