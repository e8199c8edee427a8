"""Triton implementation of fastcss::prompt_mlp_backward.

dh = dy w2ᵀ (0 unless h > 0) and dz = dh w1ᵀ are the forward's layers with the weights transposed, by strides. The
weights' gradients are whole tensors, some 5 MB for each of all classes, so writing them is the limit. A program has one
tile of one class: it looks through the index for its rows, and adds them up in their order, in registers. Most find
none and write zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .multi_lora_device import store_tile
from .prompt_mlp import layer

ROWS = tl.constexpr(128)  # entries of the index that are looked through at a time


@triton.jit(do_not_specialize=["R"])
def weights_gradient_kernel(
    x, dy, index, dweights, dbias,
    R, depth, width, stride_xr, stride_xd, BLOCK_DEPTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """dweights [K, depth, width] = Σ x_r ⊗ dy_r and dbias [K, width] = Σ dy_r over the rows of a class."""
    blocks_d, blocks_w = max(tl.cdiv(depth, BLOCK_DEPTH), 1), tl.cdiv(width, BLOCK_WIDTH)  # a bias without depth, too
    column = tl.program_id(0) % blocks_w * BLOCK_WIDTH
    d = tl.program_id(0) // blocks_w % blocks_d * BLOCK_DEPTH
    k = tl.program_id(0) // blocks_w // blocks_d
    k64 = tl.cast(k, tl.int64)
    depths, columns = d + tl.arange(0, BLOCK_DEPTH), column + tl.arange(0, BLOCK_WIDTH)
    acc = tl.zeros([BLOCK_DEPTH, BLOCK_WIDTH], tl.float32)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for first in range(0, R, ROWS):
        rows = first + tl.arange(0, ROWS)
        of_class = tl.load(index + rows, mask=rows < R, other=-1) == k
        r = tl.min(tl.where(of_class, rows, R))
        while r < R:
            r64 = tl.cast(r, tl.int64)
            g = tl.load(dy + r64 * width + columns, mask=columns < width, other=0.0).to(tl.float32)
            x_row = tl.load(x + r64 * stride_xr + depths.to(tl.int64) * stride_xd, mask=depths < depth, other=0.0)
            acc += x_row.to(tl.float32)[:, None] * g[None, :]
            total += g
            r = tl.min(tl.where(of_class & (rows > r), rows, R))
    store_tile(dweights + k64 * depth * width, acc, d, column, depth, width, width)
    if d == 0:
        tl.store(dbias + k64 * width + columns, total.to(dbias.dtype.element_ty), mask=columns < width)


def weights_gradient(x: Tensor, dy: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dweights, dbias) of a layer with these ``weights`` [K, depth, width]; dy must be contiguous."""
    classes, depth, width = weights.shape
    dweights, dbias = weights.new_empty(weights.shape), weights.new_empty(classes, width)
    blocks = max(triton.cdiv(depth, 32), 1) * triton.cdiv(width, 128)
    if classes * blocks:
        weights_gradient_kernel[(classes * blocks,)](
            x, dy, index, dweights, dbias, len(x), depth, width, *x.stride(),
            BLOCK_DEPTH=32, BLOCK_WIDTH=128, num_warps=4,
        )  # fmt: skip
    return dweights, dbias


def prompt_mlp_backward(
    dy: Tensor, z: Tensor, w1: Tensor, w2: Tensor, index: Tensor, hidden: Tensor, need_dz: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz = z.new_empty(z.shape if need_dz else (0,))
    grads = tuple(w1.new_empty(0) for _ in range(4))
    dy, index, hidden = dy.contiguous(), index.contiguous(), hidden.contiguous()
    dh = torch.empty_like(hidden)
    with torch.cuda.device_of(z):
        layer(dy, w2.mT, None, index, dh, gate=hidden)
        if need_dz:
            layer(dh, w1.mT, None, index, dz)
        if need_weights:
            grads = (*weights_gradient(z, dh, index, w1), *weights_gradient(hidden, dy, index, w2))
    return dz, *grads


LIBRARY.impl("prompt_mlp_backward.triton", prompt_mlp_backward, "CompositeExplicitAutograd")
