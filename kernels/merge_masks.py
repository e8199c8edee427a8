"""Triton implementation of fastcss::merge_masks: each pixel asks the masks, the best first, until one says yes.

K·h·w logits are read, mostly from the caches, and H·W labels written; a mask of full size never exists. What is left is
arithmetic: a pixel of a mask is the bilinear mean of four pixels of the 4h × 4w picture, each of which is the mean of
four logits. Both steps and their roundings are torch's. The taps of a row and a column are found once for a block of
pixels, before the loop over the masks, which ends when all of the block is decided. A mask is left out if no logit near
the block is above the threshold; one tile of the logits there decides that for eight masks or more. If the picture has
the size 4h × 4w already, the second step is a copy: four taps per pixel instead of sixteen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY

UPSCALE = 4
BLOCK_H, BLOCK_W = 16, 32
MAX_LOGITS = 1024  # logits near a block, of several masks, that one tile looks at


@triton.jit
def _taps(i, scale, size):
    """Return (first tap, second tap, weight of the second) of output ``i`` in torch's bilinear resizing."""
    source = tl.maximum(scale * (i.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), source - first.to(tl.float32)


@triton.jit
def _mean(a, b, weight):
    return (1.0 - weight) * a + weight * b


@triton.jit
def _upscaled(mask, rows, columns, stride_h, stride_w, there):
    """Compute pixels of the 4h × 4w picture from the taps of their rows and columns."""
    top, bottom, down = rows
    left, right, across = columns
    top, bottom = top.to(tl.int64)[:, None] * stride_h, bottom.to(tl.int64)[:, None] * stride_h
    left, right = left.to(tl.int64)[None, :] * stride_w, right.to(tl.int64)[None, :] * stride_w
    across = across[None, :]
    above = _mean(
        tl.load(mask + top + left, mask=there, other=0.0).to(tl.float32),
        tl.load(mask + top + right, mask=there, other=0.0).to(tl.float32),
        across,
    )
    below = _mean(
        tl.load(mask + bottom + left, mask=there, other=0.0).to(tl.float32),
        tl.load(mask + bottom + right, mask=there, other=0.0).to(tl.float32),
        across,
    )
    return _mean(above, below, down[:, None])


@triton.jit
def merge_masks_kernel(
    masks, scores, order, labels, score,
    K, h, w, height, width, crop_height, crop_width, scale_h, scale_w, quarter, threshold, never_above,
    stride_mk, stride_mh, stride_mw, stride_s,
    SAME_SIZE: tl.constexpr, LOOK: tl.constexpr, GROUP: tl.constexpr, REGION_H: tl.constexpr, REGION_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write labels and score [height, width] of one block. No pixel is above the threshold if no logit is above
    ``never_above``."""
    blocks = tl.cdiv(width, BLOCK_W)
    rows = tl.program_id(0) // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    there = (rows < height)[:, None] & (columns < width)[None, :]
    row, next_row, down = _taps(rows, scale_h, crop_height)
    column, next_column, across = _taps(columns, scale_w, crop_width)
    if SAME_SIZE:
        row, column = rows, columns
        next_row, next_column = row, column
    row_taps, column_taps = _taps(row, quarter, h), _taps(column, quarter, w)
    next_row_taps, next_column_taps = _taps(next_row, quarter, h), _taps(next_column, quarter, w)
    near_rows = tl.min(row_taps[0], 0) + tl.arange(0, REGION_H * REGION_W) // REGION_W
    near_columns = tl.min(column_taps[0], 0) + tl.arange(0, REGION_H * REGION_W) % REGION_W
    near_offset = near_rows.to(tl.int64) * stride_mh + near_columns.to(tl.int64) * stride_mw
    inside = (near_rows < h) & (near_columns < w)
    winner = tl.full([BLOCK_H, BLOCK_W], -1, tl.int32)
    undecided = 1
    first = 0
    while (first < K) & (undecided > 0):
        members = first + tl.arange(0, GROUP)
        wanted = members < K
        if LOOK:
            bases = masks + tl.load(order + members, mask=wanted, other=0) * stride_mk
            here = wanted[:, None] & inside[None, :]
            logits = tl.load(bases[:, None] + near_offset[None, :], mask=here, other=float("-inf"))
            wanted = tl.max((here & (logits > never_above)).to(tl.int32), 1) > 0
        k = tl.min(tl.where(wanted, members, K))
        while (k < K) & (undecided > 0):
            index = tl.load(order + k)
            mask = masks + index * stride_mk
            logit = _upscaled(mask, row_taps, column_taps, stride_mh, stride_mw, there)
            if not SAME_SIZE:
                above = _mean(
                    logit, _upscaled(mask, row_taps, next_column_taps, stride_mh, stride_mw, there), across[None, :]
                )
                below = _mean(
                    _upscaled(mask, next_row_taps, column_taps, stride_mh, stride_mw, there),
                    _upscaled(mask, next_row_taps, next_column_taps, stride_mh, stride_mw, there),
                    across[None, :],
                )
                logit = _mean(above, below, down[:, None])
            winner = tl.where((winner < 0) & (logit > threshold), index.to(tl.int32), winner)
            undecided = tl.max((there & (winner < 0)).to(tl.int32))
            k = tl.min(tl.where(wanted & (members > k), members, K))
        first += GROUP
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(labels + place, winner.to(tl.int64) + 1, mask=there)
    if score is not None:
        won = tl.load(scores + winner.to(tl.int64) * stride_s, mask=there & (winner >= 0), other=0.0)
        tl.store(score + place, won, mask=there)


def _region(block: int, scale: float) -> int:
    """Return how many logits, as a power of two, contain all taps of ``block`` outputs."""
    return triton.next_power_of_2(int(block * scale / UPSCALE) + 4)


def merge_masks(
    masks: Tensor,
    scores: Tensor,
    order: Tensor,
    height: int,
    width: int,
    crop_height: int,
    crop_width: int,
    threshold: float,
    want_score: bool,
) -> tuple[Tensor, Tensor]:
    count, h, w = masks.shape
    labels = masks.new_empty((height, width), dtype=torch.int64)
    score = scores.new_empty((height, width) if want_score else (0,))
    scale_h, scale_w = crop_height / height, crop_width / width
    region_h, region_w = _region(BLOCK_H, scale_h), _region(BLOCK_W, scale_w)
    look = region_h * region_w <= MAX_LOGITS
    region_h, region_w = (region_h, region_w) if look else (1, 1)
    if labels.numel():
        with torch.cuda.device_of(masks):
            merge_masks_kernel[(triton.cdiv(height, BLOCK_H) * triton.cdiv(width, BLOCK_W),)](
                masks, scores, order.contiguous(), labels, score if want_score else None,
                count, h, w, height, width, crop_height, crop_width, scale_h, scale_w, 1 / UPSCALE,
                # The mean of logits of the same sign is off by a few roundings of 2⁻²⁴.
                threshold, threshold - 2e-6 * abs(threshold), *masks.stride(), *scores.stride(),
                SAME_SIZE=(height, width) == (crop_height, crop_width), LOOK=look,
                GROUP=min(MAX_LOGITS // (region_h * region_w), 32), REGION_H=region_h, REGION_W=region_w,
                BLOCK_H=BLOCK_H, BLOCK_W=BLOCK_W, num_warps=4,
            )  # fmt: skip
    return labels, score


LIBRARY.impl("merge_masks.triton", merge_masks, "CompositeExplicitAutograd")
