"""Device code of fastcss::window_attention: where a window's tokens lie in the map, and how they are read.

``sizes`` are (H, W, rows of windows, columns of windows), ``window`` is (number, first row, first column) of one, and
``place`` is (sample, head, rows, columns) of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .affinity_device import exp2
from .class_centers import LOG2_E
from .multi_lora_device import dot


@triton.jit
def window_at(number, sizes, shift, WINDOW: tl.constexpr):
    """Return (sample, window); windows are counted row by row and sample by sample."""
    _, _, rows, columns = sizes
    top, left = number // columns % rows * WINDOW + shift, number % columns * WINDOW + shift
    return tl.cast(number // (columns * rows), tl.int64), (number, top, left)


@triton.jit
def tokens_at(index, sample, head, window, sizes, WINDOW: tl.constexpr):
    """Return (place of a window's tokens, whether they are in the map or padding, whether the window has so many).

    Tokens past the window's last repeat that one, so that the rest of a tile is finite if the window is.
    """
    H, W, rows, columns = sizes
    _, top, left = window
    there = index < WINDOW * WINDOW
    index = tl.minimum(index, WINDOW * WINDOW - 1)
    row, column = top + index // WINDOW, left + index % WINDOW
    row = tl.where(row < rows * WINDOW, row, row - rows * WINDOW)
    column = tl.where(column < columns * WINDOW, column, column - columns * WINDOW)
    return (sample, head, row, column), (row < H) & (column < W), there


@triton.jit
def regions_of(index, window, sizes, WINDOW: tl.constexpr):
    """Return the region of each token: those that came around an edge of the map are no neighbours of the others.

    The parity of the window's number changes nothing, but without it the compiler would keep the columns of all tokens
    in registers from window to window.
    """
    _, _, rows, columns = sizes
    number, top, left = window
    below = index >= (rows * WINDOW - top) * WINDOW
    right = (index + number % 2 * WINDOW) % WINDOW >= columns * WINDOW - left
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def offsets_of(strides, place, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Return offsets [tokens, BLOCK_D] in a sample's head; the strides are those of (sample, row, column, head). They
    have 32 bits unless WIDE: with 64, the addresses of a window's tensors take twice the registers."""
    _, _, row, column = place
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    return (row * strides[1] + column * strides[2])[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def head_of(x, strides, place):
    return x + place[0] * strides[0] + tl.cast(place[1], tl.int64) * strides[3]


@triton.jit
def load_tokens(x, strides, place, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    mask = mask[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(head_of(x, strides, place) + offsets_of(strides, place, BLOCK_D, WIDE), mask=mask, other=0.0)


@triton.jit
def load_filled(
    x, strides, pad, pad_strides, place, in_map, there, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):
    """Load the tokens ``in_map``, the padding [B, heads, D] in place of others, and 0 for those not ``there``."""
    channels = tl.arange(0, BLOCK_D)[None, :]
    pad += place[0] * pad_strides[0] + tl.cast(place[1], tl.int64) * pad_strides[1]
    tokens = head_of(x, strides, place) + offsets_of(strides, place, BLOCK_D, WIDE)
    return tl.load(tl.where(in_map[:, None], tokens, pad + channels), mask=there[:, None] & (channels < D), other=0.0)


@triton.jit
def store_tokens(x, tile, place, mask, sizes, heads, D: tl.constexpr, WIDE: tl.constexpr):
    """Store tokens into a dense [B, H, W, heads, D]."""
    H, W, _, _ = sizes
    sample, head, row, column = place
    x += (sample * H * W * heads + head) * D
    token = row.to(tl.int64) * W + column if WIDE else row * W + column
    channels = tl.arange(0, tile.shape[1])
    mask = mask[:, None] & (channels < D)[None, :]
    tl.store(x + (token * (heads * D))[:, None] + channels[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias, head, queries, keys, COUNT: tl.constexpr):
    """Load the bias [queries, keys] of a head; it is −∞ for keys past the last, so that nothing else has to mask
    them."""
    bias += tl.cast(head, tl.int64) * (COUNT * COUNT)
    offset = tl.minimum(queries, COUNT - 1)[:, None] * COUNT + keys[None, :]
    return tl.load(bias + offset, mask=(keys < COUNT)[None, :], other=float("-inf"))


@triton.jit
def scores_of(
    q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute scale · q kᵀ + bias, less 100 between tokens that are no neighbours."""
    products = dot(q_tile, tl.trans(k_tile), tl.zeros([q_tile.shape[0], k_tile.shape[0]], tl.float32), PRECISION)
    scores = products * scale + bias_tile.to(tl.float32)
    if (window[1] + WINDOW > sizes[2] * WINDOW) | (window[2] + WINDOW > sizes[3] * WINDOW):
        query_regions, key_regions = regions_of(queries, window, sizes, WINDOW), regions_of(keys, window, sizes, WINDOW)
        scores += tl.where(query_regions[:, None] == key_regions[None, :], 0.0, -100.0)
    return scores


@triton.jit
def exp_above(scores, base):
    """Compute exp(score − maximum) of rows; ``base`` is the maximum in units of log 2."""
    return exp2(scores * LOG2_E - base[:, None])


@triton.jit
def padding_slot(window, sizes, WINDOW: tl.constexpr):
    """Return a window's slot: padding is in the last two rows and columns of windows, and each of those has one."""
    H, _, rows, columns = sizes
    number, top, _ = window
    column, row = number % columns, number // columns % rows
    right = 2 * columns + (columns - 1 - column) * rows + row
    return tl.where(top + WINDOW > H, (rows - 1 - row) * columns + column, right)


@triton.jit
def store_padding_sum(parts, tile, padding, slot, place, batches, heads, D: tl.constexpr):
    """Store the sum of the ``tile`` over ``padding`` tokens to a slot of ``parts`` [slots, B, heads, D]."""
    channels = tl.arange(0, tile.shape[1])
    parts += ((tl.cast(slot, tl.int64) * batches + place[0]) * heads + place[1]) * D
    tl.store(parts + channels, tl.sum(tl.where(padding[:, None], tile, 0.0), 0), mask=channels < D)


@triton.jit(do_not_specialize=["PARTS"])
def sum_parts_kernel(parts, total, PARTS, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum ``parts`` [PARTS, N] to total [N]."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for p in range(0, PARTS, BLOCK_P):
        rows = p + tl.arange(0, BLOCK_P)
        mask = (rows < PARTS)[:, None] & (columns < N)[None, :]
        acc += tl.load(parts + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=mask, other=0.0)
    tl.store(total + columns, tl.sum(acc, 0).to(total.dtype.element_ty), mask=columns < N)
