"""Triton implementation of fastcss::prompt_mlp: two layers, each row of z with the weights of its own class.

A row reads L H + H O weights for 2 FLOP each, so the weights' bytes are the limit (5 MB per class in bfloat16), and
only rows of the same class can share them. Each layer is one launch. A program takes one row and 32 columns, so that 20
rows are 640 programs and more, each with four loads of 16 bytes per thread in flight. A thread keeps the sums of the
weights that it reads, which are added once at the end: the order of a sum depends on the layer alone, so a row's result
is the same whatever the other rows are. Programs of all rows for one block of columns are neighbours, so rows of the
same class find their weights in the cache. The rows in between, after the relu, stay in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .multi_lora_device import load_tile


@triton.jit(do_not_specialize=["R"])
def layer_kernel(
    x, weights, bias, index, gate, y,
    R, K, depth, width, stride_xr, stride_xd, stride_wk, stride_wd, stride_ww, stride_bk, stride_bw,
    RELU: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """y [R, width] = x_r W_i + bias_i for i = index[r], 0 for index -1 and NaN for one outside of the classes.

    If ``gate`` [R, width] is given, the result is also 0 where the gate is not above 0: the relu's gradient.
    """
    r = tl.cast(tl.program_id(0) % R, tl.int64)
    column = tl.program_id(0) // R * BLOCK_WIDTH
    columns = column + tl.arange(0, BLOCK_WIDTH)
    i = tl.load(index + r)
    known = (i >= 0) & (i < K)
    x += r * stride_xr
    weights += i * stride_wk
    acc = tl.zeros([BLOCK_DEPTH, BLOCK_WIDTH], tl.float32)
    for d in range(0, tl.where(known, depth, 0), BLOCK_DEPTH):
        rows = d + tl.arange(0, BLOCK_DEPTH)
        x_rows = tl.load(x + rows.to(tl.int64) * stride_xd, mask=rows < depth, other=0.0).to(tl.float32)
        w_tile = load_tile(weights, d, column, depth, width, stride_wd, stride_ww, BLOCK_DEPTH, BLOCK_WIDTH)
        acc += x_rows[:, None] * w_tile.to(tl.float32)
    total = tl.sum(acc, 0)
    if bias is not None:
        offset = i * stride_bk + columns.to(tl.int64) * stride_bw
        total += tl.load(bias + offset, mask=columns < tl.where(known, width, 0), other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)
    if gate is not None:
        above = tl.load(gate + r * width + columns, mask=columns < width, other=0.0)
        total = tl.where(above <= 0.0, 0.0, total)
    total = tl.where(known, total, tl.where(i == -1, 0.0, float("nan")))
    tl.store(y + r * width + columns, total.to(y.dtype.element_ty), mask=columns < width)


def layer(
    x: Tensor, weights: Tensor, bias: Tensor | None, index: Tensor, y: Tensor, *, relu: bool = False,
    gate: Tensor | None = None,
) -> None:  # fmt: skip
    """See layer_kernel; ``weights`` [K, depth, width] by their strides."""
    classes, depth, width = weights.shape
    if y.numel():
        layer_kernel[(len(y) * triton.cdiv(width, 32),)](
            x, weights, bias, index, gate, y, len(y), classes, depth, width,
            *x.stride(), *weights.stride(), *((0, 0) if bias is None else bias.stride()),
            RELU=relu, BLOCK_DEPTH=128, BLOCK_WIDTH=32, num_warps=4,
        )  # fmt: skip


def prompt_mlp(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    hidden = z.new_empty((len(z), w1.shape[2]), dtype=torch.float32)
    y = z.new_empty(len(z), w2.shape[2])
    index = index.contiguous()
    with torch.cuda.device_of(z):
        layer(z, w1, b1, index, hidden, relu=True)
        layer(hidden, w2, b2, index, y)
    return y, hidden


LIBRARY.impl("prompt_mlp.triton", prompt_mlp, "CompositeExplicitAutograd")
