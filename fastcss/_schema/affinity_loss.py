import torch
from torch import Tensor

from ._library import define

# labels int32 [B, N]. loss: float32 scalar, the mean over the pairs whose two pixels are not ignored; 0 without any.
_AFFINITY_LOSS = "(Tensor q, Tensor k, Tensor labels, float scale, int ignore_index) -> Tensor"


def _affinity_loss_fake(q, k, labels, scale, ignore_index) -> Tensor:
    return q.new_empty((), dtype=torch.float32)


define("affinity_loss", _AFFINITY_LOSS, _affinity_loss_fake)

_AFFINITY_LOSS_BACKWARD = (
    "(Tensor dloss, Tensor q, Tensor k, Tensor labels, float scale, int ignore_index) -> (Tensor dq, Tensor dk)"
)


def _affinity_loss_backward_fake(dloss, q, k, labels, scale, ignore_index) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


define("affinity_loss_backward", _AFFINITY_LOSS_BACKWARD, _affinity_loss_backward_fake)
