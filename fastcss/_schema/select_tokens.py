import torch
from torch import Tensor

from ._library import define

# tokens [B, N, D], classes [B, C, D]. selected [B, C, length]: the surviving tokens of each class in token order, one
# after the other, cut or filled with zeros. counts int64 [B, C] of them, presence [B, C] their mean cosine or 0. For
# the backward pass best int32 [B, N], the class a token survives for or -1, and cosine float32 [B, N] with its best.
_SELECT_TOKENS = (
    "(Tensor tokens, Tensor classes, float threshold, int length) "
    "-> (Tensor selected, Tensor counts, Tensor presence, Tensor best, Tensor cosine)"
)


def _select_tokens_fake(tokens, classes, threshold, length) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_class, per_token = classes.shape[:2], tokens.shape[:2]
    return (
        tokens.new_empty(*per_class, length),
        tokens.new_empty(per_class, dtype=torch.int64),
        tokens.new_empty(per_class),
        tokens.new_empty(per_token, dtype=torch.int32),
        tokens.new_empty(per_token, dtype=torch.float32),
    )


define("select_tokens", _SELECT_TOKENS, _select_tokens_fake)

_SELECT_TOKENS_BACKWARD = (
    "(Tensor dselected, Tensor dpresence, Tensor tokens, Tensor classes, Tensor counts, Tensor best, Tensor cosine) "
    "-> (Tensor dtokens, Tensor dclasses)"
)


def _select_tokens_backward_fake(dselected, dpresence, tokens, classes, counts, best, cosine) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), classes.new_empty(classes.shape)


define("select_tokens_backward", _SELECT_TOKENS_BACKWARD, _select_tokens_backward_fake)
