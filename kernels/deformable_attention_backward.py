"""Triton implementation of fastcss::deformable_attention_backward.

Let w be the attention, v the corners' values, b their bilinear weights, and s = Σ b v a point's sample:

    dw = dout · s,   dlogits = w (dw − Σ w dw),   dlocation = w dout · ∂s/∂location,   dvalue = Σ w b dout

The first three are the forward's sweep again, with products along the channels. dvalue is a sum over all queries that
read a token, and a GPU keeps no order of these. So it is added up by int64 atomics: a sum of whole numbers does not
depend on the order. Attention and bilinear weights are at most 1 together, so no sum exceeds Q m, with m the largest
finite |dout| of a head; the unit is the power of two that puts Q m below 2⁶⁰. Each contribution is cut off to that
unit, less than 2⁻⁵⁸ Q m: 2⁻⁴⁴ m at 17,821 queries, while float32 sums round by 2⁻²⁴ of themselves. The two lowest bits,
which sums of multiples of four never touch, say that inf (1), −inf (2) or NaN (3) was added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import exp
from .deformable_attention import (
    TILE,
    Operands,
    cell_of,
    corner_of,
    level_sizes,
    load_axis,
    load_corner,
    load_softmax,
    load_weights,
    place_of,
    size_of,
)

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def load_gradient(dout, there, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load dout [queries, BLOCK_D] in float32; the pointers are the queries'."""
    channels = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (channels < WIDTH)[None, :]
    return tl.load(dout[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_reference(
    dreference, dx, dy, x_offset, y_offset, width, height, there, POINTS: tl.constexpr, BOX: tl.constexpr
):
    """Store the sums over the points, for one level of one head."""
    dx, dy = dx * width, dy * height
    tl.store(dreference, tl.sum(dx, 1), mask=there)
    tl.store(dreference + 1, tl.sum(dy, 1), mask=there)
    if BOX:
        tl.store(dreference + 2, tl.sum(dx * x_offset, 1) * (0.5 / POINTS), mask=there)
        tl.store(dreference + 3, tl.sum(dy * y_offset, 1) * (0.5 / POINTS), mask=there)


@triton.jit(do_not_specialize=["Q"])
def points_gradient_kernel(
    value, reference, offsets, logits, dout, doffsets, dlogits, dreference, largest, sizes, heads, Q,
    stride_vb, stride_vs, stride_vh, stride_rb, stride_rq, stride_rl, stride_rx, stride_ob, stride_oq, stride_lb,
    stride_lq,
    NEED_REFERENCE: tl.constexpr, BLOCK_L: tl.constexpr,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, BOX: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write doffsets, dlogits and dreference [B, heads, Q, levels, xy]; and largest [B, heads, 2]: the largest finite
    |dout|, as its bits, and whether anything is not finite."""
    batch, head, queries, there = place_of(heads, Q, BLOCK_Q)
    value += batch * stride_vb + tl.cast(head, tl.int64) * stride_vh
    logits += batch * stride_lb + queries.to(tl.int64) * stride_lq + head * (LEVELS * POINTS)
    offsets += batch * stride_ob + queries.to(tl.int64) * stride_oq + head * (LEVELS * POINTS * 2)
    reference += batch * stride_rb + queries.to(tl.int64) * stride_rq
    number = (batch * Q + queries) * heads + head
    dreference += ((batch * heads + head) * Q + queries) * (LEVELS * (4 if BOX else 2))
    gradient = load_gradient(dout + number * WIDTH, there, WIDTH, BLOCK_D)
    highest, total = load_softmax(logits, there, LEVELS * POINTS, BLOCK_A)
    finite = tl.abs(gradient) < INFINITY
    peak = tl.max(tl.max(tl.where(finite, tl.abs(gradient), 0.0), 1), 0)
    lost = tl.max(tl.max(tl.where(finite & (total == total)[:, None], 0, 1), 1), 0)
    tl.atomic_max(largest + (batch * heads + head) * 2, peak.to(tl.int32, bitcast=True), sem="relaxed")
    tl.atomic_max(largest + (batch * heads + head) * 2 + 1, lost, sem="relaxed")

    points = tl.arange(0, BLOCK_P)
    valid = there[:, None] & (points < POINTS)[None, :]
    levels = tl.arange(0, BLOCK_L)[None, None, :]
    dweights = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_L], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    for level in range(LEVELS):
        height, width = size_of(sizes, level, LEVELS)
        at = reference + tl.cast(level, tl.int64) * stride_rl
        x, x_offset, x_step = load_axis(at, offsets, level, width, there, stride_rx, 0, POINTS, BLOCK_P, BOX)
        y, y_offset, y_step = load_axis(at, offsets, level, height, there, stride_rx, 1, POINTS, BLOCK_P, BOX)
        left, right_share = cell_of(x, width)
        top, low_share = cell_of(y, height)
        dweight = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
        dx = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
        dy = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
        for low in tl.static_range(2):
            a = load_corner(value, left, top + low, height, width, stride_vs, WIDTH, BLOCK_D)
            b = load_corner(value, left + 1, top + low, height, width, stride_vs, WIDTH, BLOCK_D)
            a, b = tl.sum(a * gradient[:, None, :], 2), tl.sum(b * gradient[:, None, :], 2)
            share = low_share if low else 1 - low_share
            between = (1 - right_share) * a + right_share * b
            dweight += share * between
            dx += share * (b - a)
            dy += between if low else -between
        weight = load_weights(logits, level, highest, total, there, POINTS, BLOCK_P)
        dweight = tl.where(valid, dweight, 0.0)
        mean += tl.sum(weight * dweight, 1)
        dweights = tl.where(levels == level, dweight[:, :, None], dweights)
        dx, dy = tl.where(valid, weight * dx, 0.0), tl.where(valid, weight * dy, 0.0)
        place = (number * (LEVELS * POINTS) + level * POINTS)[:, None] + points[None, :]
        step = tl.join(dx * x_step[:, None], dy * y_step[:, None]).to(doffsets.dtype.element_ty)
        axes = tl.arange(0, 2)[None, None, :]
        tl.store(doffsets + place[:, :, None] * 2 + axes, step, mask=valid[:, :, None] & (axes >= 0))
        if NEED_REFERENCE:
            into = dreference + level * (4 if BOX else 2)
            store_reference(into, dx, dy, x_offset, y_offset, width, height, there, POINTS, BOX)
        value += tl.cast(height, tl.int64) * tl.cast(width, tl.int64) * stride_vs
    column = levels * POINTS + points[None, :, None]
    mask = valid[:, :, None] & (levels < LEVELS)
    logit = tl.load(logits[:, None, None] + column, mask=mask, other=0.0).to(tl.float32)
    weights = exp(logit - highest[:, None, None]) / total[:, None, None]
    result = weights * (dweights - mean[:, None, None])
    place = (number * (LEVELS * POINTS))[:, None, None] + column
    tl.store(dlogits + place, result.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit
def unit_shift(largest, QUERY_BITS: tl.constexpr):
    """Return shift; the unit of a head's sums is 2^−shift. It is the largest shift for which Q < 2^QUERY_BITS times
    ``largest`` stays below 2⁶⁰."""
    exponent = (tl.load(largest) >> 23) - 126  # largest < 2^exponent
    return 60 - QUERY_BITS - exponent


@triton.jit
def times_power_of_two(x, exponent):
    """Multiply in two steps: 2^186, for the smallest gradients, is no float32."""
    half = exponent // 2
    x *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    return x * ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)


# If Triton knew of the 16-byte alignment, it would give each thread two neighbouring channels, and one atomic of a warp
# would reach only every second channel.
@triton.jit(do_not_specialize=["S", "Q"], do_not_specialize_on_alignment=["sums"])
def value_sums_kernel(
    reference, offsets, logits, dout, largest, sums, sizes, heads, S, Q,
    stride_rb, stride_rq, stride_rl, stride_rx, stride_ob, stride_oq, stride_lb, stride_lq,
    QUERY_BITS: tl.constexpr,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, WIDTH: tl.constexpr, BOX: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add to sums [B, S, heads, D] int64, which are zeros before: four times dvalue in units, and the two bits."""
    batch, head, queries, there = place_of(heads, Q, BLOCK_Q)
    logits += batch * stride_lb + queries.to(tl.int64) * stride_lq + head * (LEVELS * POINTS)
    offsets += batch * stride_ob + queries.to(tl.int64) * stride_oq + head * (LEVELS * POINTS * 2)
    reference += batch * stride_rb + queries.to(tl.int64) * stride_rq
    dout += ((batch * Q + queries) * heads + head) * WIDTH
    sums += (batch * S * heads + head) * WIDTH
    largest += (batch * heads + head) * 2
    lost = tl.load(largest + 1) != 0
    gradient = load_gradient(dout, there, WIDTH, BLOCK_D)
    gradient = times_power_of_two(gradient, unit_shift(largest, QUERY_BITS))
    highest, total = load_softmax(logits, there, LEVELS * POINTS, BLOCK_A)
    channels = tl.arange(0, BLOCK_D)[None, None, :]
    for level in range(LEVELS):
        height, width = size_of(sizes, level, LEVELS)
        weight = load_weights(logits, level, highest, total, there, POINTS, BLOCK_P)
        at = reference + tl.cast(level, tl.int64) * stride_rl
        x, _, _ = load_axis(at, offsets, level, width, there, stride_rx, 0, POINTS, BLOCK_P, BOX)
        y, _, _ = load_axis(at, offsets, level, height, there, stride_rx, 1, POINTS, BLOCK_P, BOX)
        left, right_share = cell_of(x, width)
        top, low_share = cell_of(y, height)
        for corner in range(4):
            share = weight * tl.where(corner % 2 == 1, right_share, 1 - right_share)
            share *= tl.where(corner // 2 == 1, low_share, 1 - low_share)
            token = corner_of(left + corner % 2, top + corner // 2, height, width)[:, :, None]
            into = sums + token.to(tl.int64) * (heads * WIDTH) + channels
            mask = (token >= 0) & (channels < WIDTH)
            part = share[:, :, None] * gradient[:, None, :]
            finite = tl.abs(part) < INFINITY
            tl.atomic_add(into, part.to(tl.int64) * 4, mask=mask & finite, sem="relaxed")
            if lost:
                kind = tl.where(part > 0, 1, tl.where(part < 0, 2, 3)).to(tl.int64)
                tl.atomic_or(into, kind, mask=mask & (finite == 0), sem="relaxed")
        sums += tl.cast(height, tl.int64) * tl.cast(width, tl.int64) * (heads * WIDTH)


@triton.jit(do_not_specialize=["S"])
def dvalue_kernel(sums, largest, dvalue, heads, S, QUERY_BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    per_image = tl.cast(S, tl.int64) * heads * WIDTH
    blocks = tl.cdiv(per_image, BLOCK)
    batch = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = place < per_image
    total = tl.load(sums + batch * per_image + place, mask=mask, other=0)
    head = place // WIDTH % heads
    shift = unit_shift(largest + (batch * heads + head) * 2, QUERY_BITS)
    result = times_power_of_two((total >> 2).to(tl.float32), -shift)
    kind = total & 3
    result = tl.where(kind == 0, result, tl.where(kind == 1, INFINITY, tl.where(kind == 2, -INFINITY, float("nan"))))
    tl.store(dvalue + batch * per_image + place, result.to(dvalue.dtype.element_ty), mask=mask)


def deformable_attention_backward(
    dout: Tensor,
    value: Tensor,
    shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    need_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, tokens, heads, width), (queries, levels) = value.shape, (logits.shape[1], logits.shape[3])
    dvalue, doffsets, dlogits = (x.new_empty(x.shape) for x in (value, offsets, logits))
    dreference = reference_points.new_empty(reference_points.shape if need_reference else (0,))
    if not (dout.numel() and logits.numel()):
        return dvalue.zero_(), dreference.zero_(), doffsets.zero_(), dlogits.zero_()
    dout, operands = dout.contiguous(), Operands.of(value, reference_points, offsets, logits)
    sizes, block, strides = level_sizes(shapes), operands.block(TILE), operands.strides()
    parts = (batch, heads, queries, *reference_points.shape[2:]) if need_reference else (0,)
    parts = reference_points.new_empty(parts)
    largest = torch.zeros(batch, heads, 2, dtype=torch.int32, device=value.device)
    sums = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    query_bits = {"QUERY_BITS": queries.bit_length()}
    with torch.cuda.device_of(value):
        points_gradient_kernel[operands.programs(block)](
            *operands, dout, doffsets, dlogits, parts, largest, sizes, heads, queries, *strides,
            NEED_REFERENCE=need_reference, BLOCK_L=triton.next_power_of_2(levels), **block,
        )  # fmt: skip
        value_sums_kernel[operands.programs(block)](
            *operands[1:], dout, largest, sums, sizes, heads, tokens, queries, *strides[3:], **query_bits, **block
        )
        blocks = triton.cdiv(tokens * heads * width, 1024)
        dvalue_kernel[(batch * blocks,)](
            sums, largest, dvalue, heads, tokens, **query_bits, WIDTH=width, BLOCK=1024, num_warps=4
        )
        if need_reference:
            torch.sum(parts, 1, out=dreference)
    return dvalue, dreference, doffsets, dlogits


LIBRARY.impl("deformable_attention_backward.triton", deformable_attention_backward, "CompositeExplicitAutograd")
