import torch
from torch import Tensor

from ._library import raw_op


# int64 [n]: for each of n tensors a hash of its shape, dtype and bytes, of which each depends on where it is.
@raw_op("(Tensor[] tensors) -> Tensor", flops=None)
def fingerprint(tensors) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)
