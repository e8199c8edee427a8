"""Device code of fastcss::relative_attention: the queries and keys of a window, and their scores.

``sizes`` are (H, W, Sh, Sw) of the map and a window, and ``corner`` is (first row, first column) of one: the map is a
window, too. A head's row of D channels is two tiles, MAIN and TAIL columns wide: 80 channels are 64 and 16, not 128.
The bias of a query is a row of Sh + Sw numbers, those of the rows and those of the columns of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .affinity_device import exp2
from .class_centers import LOG2_E
from .multi_lora_device import dot


@triton.jit
def program_at(sizes, heads, blocks):
    """Return (sample, head, window, its corner, block) of this program. The blocks of a head, which read the same keys,
    run together, and then its neighbours, which read the bytes beside them."""
    H, W, Sh, Sw = sizes
    columns = tl.cdiv(W, Sw)
    windows = tl.cdiv(H, Sh) * columns
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    number = tl.program_id(0) // (blocks * heads)
    window = number % windows
    return tl.cast(number // windows, tl.int64), head, number, (window // columns * Sh, window % columns * Sw), block


@triton.jit
def queries_in(sizes, corner):
    """Return (rows, columns) of a window's tokens that are in the map: those that fill it up are no queries."""
    H, W, Sh, Sw = sizes
    return min(Sh, H - corner[0]), min(Sw, W - corner[1])


@triton.jit
def queries_at(first, sizes, corner, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Return (row, column, whether there are so many) of a window's queries from ``first`` on. Those past the last
    repeat it, so that no load has a mask. A map that is one window (WHOLE) is a row of queries, which spares a division
    of each."""
    rows, columns = queries_in(sizes, corner)
    index = first + tl.arange(0, BLOCK)
    there = index < rows * columns
    index = tl.minimum(index, rows * columns - 1)
    if WHOLE:
        row, column = tl.zeros([BLOCK], tl.int32), index
    else:
        row, column = corner[0] + index // columns, corner[1] + index % columns
    return row, column, there


@triton.jit
def head_of(x, strides, sample, head):
    return x + sample * strides[0] + tl.cast(head, tl.int64) * strides[3]


@triton.jit
def load_channels(x, offsets, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Load the channels from FIRST on of the rows that begin at ``offsets``; those past the last are 0."""
    channels = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = x + offsets[:, None] + channels
    if FIRST + WIDTH > D:
        return tl.load(pointers, mask=channels < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(x, offsets, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Load both tiles of the rows that begin at ``offsets``; with no TAIL the second is the first again."""
    main = load_channels(x, offsets, D, 0, MAIN)
    return main, load_channels(x, offsets, D, MAIN, TAIL) if TAIL else main


@triton.jit
def load_queries(x, strides, place, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    row, column, _ = place
    return load_rows(x, row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2], D, MAIN, TAIL)


@triton.jit
def keys_at(row, column, sizes, corner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tell which keys of the tile from (row, column) of a window on are in the map, and which are in the window."""
    H, W, Sh, Sw = sizes
    keys = tl.arange(0, ROWS * COLUMNS)
    rows, columns = row + keys // COLUMNS, column + keys % COLUMNS
    is_key = (rows < Sh) & (columns < Sw)
    return (corner[0] + rows < H) & (corner[1] + columns < W) & is_key, is_key


@triton.jit
def _key_channels(
    x, strides, pad, place, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    row, column, sizes, corner = place
    keys = tl.arange(0, ROWS * COLUMNS)
    x += tl.cast(corner[0] + row, tl.int64) * strides[1] + tl.cast(corner[1] + column, tl.int64) * strides[2]
    channels = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = x + (keys // COLUMNS * strides[1] + keys % COLUMNS * strides[2])[:, None] + channels
    if not (MASKED or FILLED):
        if FIRST + WIDTH > D:
            return tl.load(pointers, mask=channels < D, other=0.0)
        return tl.load(pointers)
    in_map, is_key = keys_at(row, column, sizes, corner, ROWS, COLUMNS)
    if FILLED:
        pointers = tl.where(in_map[:, None], pointers, pad + channels)
    return tl.load(pointers, mask=is_key[:, None] & (channels < D), other=0.0)


@triton.jit
def load_keys(
    x, strides, pad, row, column, sizes, corner, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """Load both tiles of ROWS × COLUMNS keys from (row, column) of a window on: ``pad`` in place of those outside of
    the map (FILLED), and 0 for those outside of the window (MASKED)."""
    place = row, column, sizes, corner
    main = _key_channels(x, strides, pad, place, D, 0, MAIN, ROWS, COLUMNS, MASKED, FILLED)
    return main, _key_channels(x, strides, pad, place, D, MAIN, TAIL, ROWS, COLUMNS, MASKED, FILLED) if TAIL else main


@triton.jit
def products(a, b, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Compute a bᵀ of two pairs of tiles."""
    acc = dot(a[0], tl.trans(b[0]), tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32), PRECISION)
    if TAIL:
        acc = dot(a[1], tl.trans(b[1]), acc, PRECISION)
    return acc


@triton.jit
def load_bias(bias, place, numbers, last, sizes, MASKED: tl.constexpr):
    """Load the ``numbers`` of the queries' bias. Those from ``last`` on are −∞, so that nothing else has to mask what
    is no key (MASKED)."""
    _, W, Sh, Sw = sizes
    row, column, _ = place
    pointers = bias + ((row * W + column).to(tl.int64) * (Sh + Sw))[:, None] + numbers[None, :]
    if MASKED:
        return tl.load(pointers, mask=numbers[None, :] < last, other=float("-inf"))
    return tl.load(pointers)


@triton.jit
def scores_of(products, bias_w, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the scores [queries, rows, columns] without the bias of rows, which is one number for all columns."""
    return tl.reshape(products, [products.shape[0], ROWS, COLUMNS]) * scale + bias_w[:, None, :]


@triton.jit
def exp_above(scores, bias_h, base, EXACT: tl.constexpr):
    """Compute exp(score − base) as [queries, keys]; the base is one of each query. Without the rounding of what is
    subtracted in units of log 2 (EXACT), it takes one more instruction."""
    base = base[:, None] - bias_h
    if EXACT:
        weights = exp2((scores - base[:, :, None]) * LOG2_E)
    else:
        weights = exp2(scores * LOG2_E - (base * LOG2_E)[:, :, None])
    return tl.reshape(weights, [scores.shape[0], scores.shape[1] * scores.shape[2]])


@triton.jit
def load_statistics(stats, place, sizes):
    """Return (largest score, 1 / Σ e^(score − largest)) of queries; the second is 0 for those that are not there."""
    row, column, there = place
    stats += (row * sizes[1] + column).to(tl.int64) * 2
    return tl.load(stats), tl.where(there, exp2(tl.load(stats + 1) * -LOG2_E), 0.0)


@triton.jit
def store_rows(x, tiles, offsets, mask, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Store both tiles to the rows that begin at ``offsets``."""
    channels = tl.arange(0, MAIN)[None, :]
    tl.store(x + offsets[:, None] + channels, tiles[0].to(x.dtype.element_ty), mask=mask[:, None] & (channels < D))
    if TAIL:
        channels = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(x + offsets[:, None] + channels, tiles[1].to(x.dtype.element_ty), mask=mask[:, None] & (channels < D))
