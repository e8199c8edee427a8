import math

import torch
from torch import Tensor

from ._library import raw_op


# tokens [B, N, D], classes [B, C, D]. selected [B, C, length]: the surviving tokens of each class in token order, one
# after the other, cut or filled with zeros. counts int64 [B, C] of them. presence [B, C], the mean cosine, or 0, of the
# support int64 [B, C] tokens whose cosine with the class is at least the threshold; with best_only of the surviving
# ones. For the backward pass best int32 [B, N], the class a token survives for or -1, and above int32 [B, N, ⌈C/32⌉]:
# bit c % 32 of word c / 32 says that class c averages the token; with best_only, where best says it, there is no word.
@raw_op(
    "(Tensor tokens, Tensor classes, float threshold, SymInt length, bool best_only) "
    "-> (Tensor selected, Tensor counts, Tensor presence, Tensor support, Tensor best, Tensor above)",
    flops=lambda tokens, classes, *_: 2 * math.prod(tokens) * classes[1],
)
def select_tokens(
    tokens, classes, threshold, length, best_only
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_class, per_token = classes.shape[:2], tokens.shape[:2]
    return (
        tokens.new_empty(*per_class, length),
        tokens.new_empty(per_class, dtype=torch.int64),
        tokens.new_empty(per_class),
        tokens.new_empty(per_class, dtype=torch.int64),
        tokens.new_empty(per_token, dtype=torch.int32),
        tokens.new_empty((*per_token, 0 if best_only else (classes.shape[1] + 31) // 32), dtype=torch.int32),
    )


@raw_op(
    "(Tensor dselected, Tensor dpresence, Tensor tokens, Tensor classes, Tensor support, Tensor best, Tensor above) "
    "-> (Tensor dtokens, Tensor dclasses)",
    flops=None,
)
def select_tokens_backward(dselected, dpresence, tokens, classes, support, best, above) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), classes.new_empty(classes.shape)
