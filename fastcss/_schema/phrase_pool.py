import math

from torch import Tensor

from ._library import raw_op


# cls [B, D], phrases [C, M, D] → pooled [B, C, D] = Σ_m softmax_m(cos(cls_b, phrases_cm)) phrases_cm.
@raw_op("(Tensor cls, Tensor phrases) -> Tensor", flops=lambda cls, phrases: 4 * cls[0] * math.prod(phrases))
def phrase_pool(cls, phrases) -> Tensor:
    return cls.new_empty(cls.shape[0], phrases.shape[0], cls.shape[1])


@raw_op(
    "(Tensor dpooled, Tensor cls, Tensor phrases) -> (Tensor dcls, Tensor dphrases)",
    flops=lambda dpooled, cls, phrases: 10 * cls[0] * math.prod(phrases),
)
def phrase_pool_backward(dpooled, cls, phrases) -> tuple[Tensor, Tensor]:
    return cls.new_empty(cls.shape), phrases.new_empty(phrases.shape)
