from torch import Tensor

from ._library import define

# cls [B, D], phrases [C, M, D] → pooled [B, C, D] = Σ_m softmax_m(cos(cls_b, phrases_cm)) phrases_cm.
_PHRASE_POOL = "(Tensor cls, Tensor phrases) -> Tensor"


def _phrase_pool_fake(cls, phrases) -> Tensor:
    return cls.new_empty(cls.shape[0], phrases.shape[0], cls.shape[1])


define("phrase_pool", _PHRASE_POOL, _phrase_pool_fake)

_PHRASE_POOL_BACKWARD = "(Tensor dpooled, Tensor cls, Tensor phrases) -> (Tensor dcls, Tensor dphrases)"


def _phrase_pool_backward_fake(dpooled, cls, phrases) -> tuple[Tensor, Tensor]:
    return cls.new_empty(cls.shape), phrases.new_empty(phrases.shape)


define("phrase_pool_backward", _PHRASE_POOL_BACKWARD, _phrase_pool_backward_fake)
