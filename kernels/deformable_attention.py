"""Triton implementation of fastcss::deformable_attention: softmax, locations, bilinear reads and weighted sum at once.

The bytes that must move (value, offsets, logits, output) are few. But 16 points have 64 corners: if each token is a
query, the value is read 64 times, 64 bytes (32 channels of bfloat16) at a time, from L1 and L2. So a program takes
consecutive queries of one head, whose corners are close to each other, level by level in a tile [queries, points,
channels]. A few neighbouring threads read the channels of a corner, 16 bytes each; the points are summed within a
thread; and what depends on the point alone is computed once per point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import exp
from .tuned import tuned

TILE = 1024  # elements, 32 for each thread of a single warp: its threads exchange values without waiting for others


@triton.jit
def load_softmax(logits, there, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return (maximum, sum of exponentials) [queries] of the rows ``logits``, COUNT long, in float32."""
    columns = tl.arange(0, BLOCK)
    mask = there[:, None] & (columns < COUNT)[None, :]
    row = tl.load(logits[:, None] + columns[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    row = tl.where(there[:, None], row, 0.0)
    highest = tl.max(row, 1)
    return highest, tl.sum(exp(row - highest[:, None]), 1)


@triton.jit
def load_weights(logits, level, highest, total, there, POINTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the attention [queries, BLOCK_P] of the level's points, 0 past the last point."""
    points = tl.arange(0, BLOCK_P)
    mask = there[:, None] & (points < POINTS)[None, :]
    row = tl.load(logits[:, None] + (level * POINTS + points)[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, exp(row - highest[:, None]) / total[:, None], 0.0)


@triton.jit
def load_axis(
    reference, offsets, level, size, there, stride_rx, AXIS: tl.constexpr, POINTS: tl.constexpr, BLOCK_P: tl.constexpr,
    BOX: tl.constexpr,
):  # fmt: skip
    """Return (coordinate in pixels, offset) [queries, BLOCK_P] along x (0) or y (1), and the pixels per unit of offset
    [queries]; ``size`` is the level's in that direction. Padding points lie outside of the level."""
    points = tl.arange(0, BLOCK_P)
    mask = there[:, None] & (points < POINTS)[None, :]
    column = (level * POINTS + points) * 2 + AXIS
    offset = tl.load(offsets[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    center = tl.load(reference + AXIS * stride_rx, mask=there, other=0.0)
    step = tl.full([there.shape[0]], 1.0, tl.float32)
    if BOX:
        step = tl.load(reference + (2 + AXIS) * stride_rx, mask=there, other=0.0) * (0.5 / POINTS) * size
    coordinate = (center * size)[:, None] + offset * step[:, None] - 0.5
    return tl.where(mask, coordinate, -2.0), offset, step


@triton.jit
def size_of(sizes, level, LEVELS: tl.constexpr):
    """(height, width) of a level."""
    height, width = sizes[0], sizes[1]
    for i in tl.static_range(1, LEVELS):
        height, width = tl.where(level == i, sizes[2 * i], height), tl.where(level == i, sizes[2 * i + 1], width)
    return height, width


@triton.jit
def cell_of(coordinate, size):
    """Return (lower corner, the coordinate's distance from it). If the coordinate is NaN or its cell has no corner in
    the level, the corner is −2, so that neither it nor the next is in the level: only small numbers become integers."""
    lower = tl.floor(coordinate)
    near = (coordinate > -1.0) & (coordinate < size)
    return tl.where(near, lower, -2.0).to(tl.int32), coordinate - lower


@triton.jit
def corner_of(column, row, height, width):
    """Return a corner's token in the level, −1 outside of it: threads exchange only this one number."""
    height, width = tl.cast(height, tl.int32), tl.cast(width, tl.int32)
    there = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return tl.where(there, row * width + column, -1)


@triton.jit
def load_corner(value, column, row, height, width, stride_vs, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load value [queries, points, BLOCK_D] of a corner in float32, 0 outside of the level."""
    token, channels = corner_of(column, row, height, width)[:, :, None], tl.arange(0, BLOCK_D)
    mask = token >= 0
    if WIDTH != BLOCK_D:
        mask = mask & (channels < WIDTH)[None, None, :]
    place = token.to(tl.int64) * stride_vs + channels[None, None, :]
    return tl.load(value + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def place_of(heads, Q, BLOCK_Q: tl.constexpr):
    """Return (image, head, queries, which of them exist) of this program; a head's queries follow each other."""
    blocks = tl.cdiv(Q, BLOCK_Q)
    per_head = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return tl.cast(per_head // heads, tl.int64), per_head % heads, queries, queries < Q


@triton.jit(do_not_specialize=["Q"])
def deformable_attention_kernel(
    value, reference, offsets, logits, out, sizes, heads, Q,
    stride_vb, stride_vs, stride_vh, stride_rb, stride_rq, stride_rl, stride_rx, stride_ob, stride_oq, stride_lb,
    stride_lq,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, BOX: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, head, queries, there = place_of(heads, Q, BLOCK_Q)
    value += batch * stride_vb + tl.cast(head, tl.int64) * stride_vh
    logits += batch * stride_lb + queries.to(tl.int64) * stride_lq + head * (LEVELS * POINTS)
    offsets += batch * stride_ob + queries.to(tl.int64) * stride_oq + head * (LEVELS * POINTS * 2)
    reference += batch * stride_rb + queries.to(tl.int64) * stride_rq
    highest, total = load_softmax(logits, there, LEVELS * POINTS, BLOCK_A)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(LEVELS):
        height, width = size_of(sizes, level, LEVELS)
        weight = load_weights(logits, level, highest, total, there, POINTS, BLOCK_P)
        at = reference + tl.cast(level, tl.int64) * stride_rl
        x, _, _ = load_axis(at, offsets, level, width, there, stride_rx, 0, POINTS, BLOCK_P, BOX)
        y, _, _ = load_axis(at, offsets, level, height, there, stride_rx, 1, POINTS, BLOCK_P, BOX)
        left, right_share = cell_of(x, width)
        top, low_share = cell_of(y, height)
        sampled = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_D], tl.float32)
        for corner in tl.static_range(4):
            share = weight * (right_share if corner % 2 else 1 - right_share)
            share *= low_share if corner // 2 else 1 - low_share
            column, row = left + corner % 2, top + corner // 2
            sampled += share[:, :, None] * load_corner(value, column, row, height, width, stride_vs, WIDTH, BLOCK_D)
        acc += tl.sum(sampled, 1)
        value += tl.cast(height, tl.int64) * tl.cast(width, tl.int64) * stride_vs
    channels = tl.arange(0, BLOCK_D)
    place = ((batch * Q + queries) * heads + head) * WIDTH
    mask = there[:, None] & (channels < WIDTH)[None, :]
    tl.store(out + place[:, None] + channels[None, :], acc.to(out.dtype.element_ty), mask=mask)


@tuned("BLOCK_Q")
def query_tile(points: int, width: int, elements: int) -> dict[str, int]:
    """Choose how many queries make a tile of ``elements``; at least one, even if its points are more."""
    of_query = triton.next_power_of_2(points) * triton.next_power_of_2(width)
    queries = max(1, min(elements // of_query, 128))
    return {"BLOCK_Q": queries, "num_warps": max(1, min(queries * of_query // 1024, 16))}


class Operands(NamedTuple):
    """Holds the operands in layouts that the kernels read; a tensor that is not dense where it must be is copied."""

    value: Tensor  # [B, S, heads, D], channels next to each other
    reference: Tensor  # [B, Q, levels, 2 or 4], any strides
    offsets: Tensor  # [B, Q, heads, levels, points, 2], dense within a query
    logits: Tensor  # [B, Q, heads, levels, points], the same

    @classmethod
    def of(cls, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Operands:
        return cls(_dense(value, 3), reference, _dense(offsets, 2), _dense(logits, 2))

    def strides(self) -> tuple[int, ...]:
        return *self.value.stride()[:3], *self.reference.stride(), *self.offsets.stride()[:2], *self.logits.stride()[:2]

    def block(self, elements: int) -> dict[str, int]:
        """The compile-time sizes of a kernel: see query_tile."""
        levels, points = self.logits.shape[3:]
        width, next_power = self.value.shape[3], triton.next_power_of_2
        own = {"LEVELS": levels, "POINTS": points, "WIDTH": width, "BOX": self.reference.shape[3] == 4}
        blocks = {"BLOCK_A": next_power(levels * points), "BLOCK_P": next_power(points), "BLOCK_D": next_power(width)}
        return {**own, **blocks, **query_tile(points, width, elements)}

    def programs(self, block: dict[str, int]) -> tuple[int]:
        batch, queries, heads = self.logits.shape[:3]
        return (batch * heads * triton.cdiv(queries, block["BLOCK_Q"]),)


def _dense(x: Tensor, dims: int) -> Tensor:
    """Return x, or a copy if its dimensions from ``dims`` on are not dense."""
    expected = 1
    for size, stride in zip(reversed(x.shape[dims:]), reversed(x.stride()[dims:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def deformable_attention(
    value: Tensor, shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    (batch, _, heads, width), queries = value.shape, offsets.shape[1]
    out = value.new_empty(batch, queries, heads * width)
    if not (out.numel() and logits.numel()):
        return out.zero_()
    operands = Operands.of(value, reference_points, offsets, logits)
    block = operands.block(TILE)
    with torch.cuda.device_of(value):
        deformable_attention_kernel[operands.programs(block)](
            *operands, out, level_sizes(shapes), heads, queries, *operands.strides(), **block
        )
    return out


def level_sizes(shapes: list[int]) -> tuple[float, ...]:
    """Return the sizes as floats, which are exact below 2²⁴: for whole numbers in a tuple Triton compiles anew if they
    are 1 or divisible by 16."""
    return tuple(float(size) for size in shapes)


LIBRARY.impl("deformable_attention.triton", deformable_attention, "CompositeExplicitAutograd")
