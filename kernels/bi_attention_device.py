"""Device code of bi_attention and its gradient: logits, their bound and peak, what is read, and splits combined."""

from __future__ import annotations

import triton
import triton.language as tl

from .._schema.bi_attention import LEAST
from .class_centers import exp, finite_or_zero
from .cost_filter import largest, nan_or_larger
from .multi_lora_device import dot, load_tile

BOUND = tl.constexpr(LEAST)
EXTREMES = tl.constexpr(1024)  # peak_of reads this many at a time


@triton.jit
def place_of(R, heads, splits, BLOCK_R: tl.constexpr):
    """Return (sample, head, split, row block) of this program. The row blocks of a split follow each other, since they
    read the same keys."""
    blocks = tl.cdiv(R, BLOCK_R)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    which = tl.program_id(0) // (blocks * splits)
    return tl.cast(which // heads, tl.int64), which % heads, split, block


@triton.jit
def load_rows(base, first, last, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows from ``first`` on with dense channels; they are 0 from ``last`` on. A tile spans less than 2³¹
    elements, so its offsets take half the registers, and no loop changes them."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < last - first)[:, None]
    if D != BLOCK_D:
        mask = mask & (columns < D)[None, :]
    base += tl.cast(first, tl.int64) * stride
    return tl.load(base + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def products(
    x,
    y,
    x_tile,
    y_tile,
    row,
    key,
    R,
    K,
    stride_xr,
    stride_yk,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute x yᵀ in float32 from the tiles or, unless CHUNK is 0, from memory, CHUNK columns of x and y at a time."""
    acc = tl.zeros([x_tile.shape[0], y_tile.shape[0]], tl.float32)
    if CHUNK:
        for d in range(0, D, CHUNK):
            x_part = load_tile(x, row, d, R, D, stride_xr, 1, x_tile.shape[0], CHUNK)
            y_part = load_tile(y, d, key, D, K, 1, stride_yk, CHUNK, y_tile.shape[0])
            acc = dot(x_part, y_part, acc, PRECISION)
    else:
        acc = dot(x_tile, tl.trans(y_tile), acc, PRECISION)
    return acc


@triton.jit
def bounded(s, peak, bound):
    """Compute max(s − peak, bound); NaN stays."""
    return nan_or_larger(s - peak, tl.zeros(s.shape, tl.float32) + bound)


@triton.jit
def load_read(mask, token, last, BLOCK: tl.constexpr):
    """Tell which tokens from ``token`` on are before ``last`` and not masked."""
    tokens = token + tl.arange(0, BLOCK)
    there = tokens < last
    if mask is not None:
        there &= tl.load(mask + tokens, mask=there, other=1) == 0
    return there


@triton.jit
def peak_of(extremes, first, count, low):
    """Return (the largest logit, the smallest with its sign changed) of the ``count`` programs from ``first`` on; the
    smallest are ``low`` places after the largest. NaN is above all."""
    most = tl.full([EXTREMES], float("-inf"), tl.float32)
    least = tl.full([EXTREMES], float("-inf"), tl.float32)
    extremes += first
    offsets = tl.arange(0, EXTREMES)
    for i in range(0, count, EXTREMES):
        there = i + offsets < count
        most = nan_or_larger(most, tl.load(extremes + i + offsets, mask=there, other=float("-inf")))
        least = nan_or_larger(least, tl.load(extremes + low + i + offsets, mask=there, other=float("-inf")))
    return largest(most, 0), largest(least, 0)


@triton.jit(do_not_specialize=["batches"])
def combine_kernel(
    parts, parts_stats, out, stats, R, D, batches, heads, splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Make one row of out [B, R, heads, D] and its stats [B, heads, R, 2] from those of the splits, in their order."""
    row = tl.cast(tl.program_id(0), tl.int64)
    at = (row // (R * heads) * heads + row % heads) * R + row // heads % R
    rows = tl.cast(batches, tl.int64) * heads * R
    columns = tl.arange(0, BLOCK_D)
    most = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        most = tl.maximum(
            most, tl.load(parts_stats + (split * rows + at) * 2, mask=split < splits, other=float("-inf"))
        )
    highest = tl.max(most, 0)
    shift = finite_or_zero(highest)
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = split < splits
        weight = exp(tl.load(parts_stats + (split * rows + at) * 2, mask=there, other=float("-inf")) - shift)
        weight *= tl.load(parts_stats + (split * rows + at) * 2 + 1, mask=there, other=0.0)
        # A split with nothing to read has NaN in place of a mean, and must not count.
        mask = (weight != 0)[:, None] & (columns < D)[None, :]
        part = tl.load(parts + ((split * rows + row) * D)[:, None] + columns[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * part
        total += weight
    sum_of_all = tl.sum(total, 0)
    tl.store(out + row * D + columns, (tl.sum(acc, 0) / sum_of_all).to(out.dtype.element_ty), mask=columns < D)
    tl.store(stats + at * 2, highest)
    tl.store(stats + at * 2 + 1, tl.log(sum_of_all))
