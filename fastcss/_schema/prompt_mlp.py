import math

import torch
from torch import Tensor

from ._library import raw_op


# z [R, L], w1 [K, L, H], b1 [K, H], w2 [K, H, O], b2 [K, O], index int64 [R] into the K classes, -1 for none: then the
# row is 0. y [R, O] = relu(z w1 + b1) w2 + b2, and hidden float32 [R, H] = relu(…) for the backward pass.
@raw_op(
    "(Tensor z, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor index) -> (Tensor y, Tensor hidden)",
    flops=lambda z, w1, b1, w2, *_: 2 * z[0] * (math.prod(w1[1:]) + math.prod(w2[1:])),
)
def prompt_mlp(z, w1, b1, w2, b2, index) -> tuple[Tensor, Tensor]:
    rows, hidden = z.shape[0], w1.shape[2]
    return z.new_empty(rows, w2.shape[2]), z.new_empty((rows, hidden), dtype=torch.float32)


def _backward_flops(dy, z, w1, w2, index, hidden, need_dz, need_weights) -> int:
    first, second = math.prod(w1[1:]), math.prod(w2[1:])
    return 2 * z[0] * (second + need_dz * first + need_weights * (first + second))


# The weights' gradients are whole tensors with zeros for the classes of no row. need_weights turned off leaves them
# empty, and need_dz dz.
@raw_op(
    "(Tensor dy, Tensor z, Tensor w1, Tensor w2, Tensor index, Tensor hidden, bool need_dz, bool need_weights) "
    "-> (Tensor dz, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    flops=_backward_flops,
)
def prompt_mlp_backward(
    dy, z, w1, w2, index, hidden, need_dz, need_weights
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    classes, _, width = w1.shape
    shapes = (w1.shape, (classes, width), w2.shape, (classes, w2.shape[2])) if need_weights else ((0,),) * 4
    return z.new_empty(z.shape if need_dz else (0,)), *(w1.new_empty(shape) for shape in shapes)
