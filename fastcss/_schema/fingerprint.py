import torch
from torch import Tensor

from ._library import define

# int64 [n]: for each of n tensors a hash of its shape, dtype and bytes, of which each depends on where it is.
_FINGERPRINT = "(Tensor[] tensors) -> Tensor"


def _fingerprint_fake(tensors) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)


define("fingerprint", _FINGERPRINT, _fingerprint_fake)
