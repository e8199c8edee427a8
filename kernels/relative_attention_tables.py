"""The products of fastcss::relative_attention with its tables: the bias of a query, and the gradients through it.

A query at position p of a window has the number q · table[p − s + S − 1] for each position s of the keys, and all
queries of a row of the map are at the same p: to the table of rows they are one matrix that meets S of its rows, and so
are the queries of a column to the other table. Such a line of queries is what a program takes: 2 N (Sh + Sw) D FLOP in
all, 1/64 of the attention's at 64². A head's bias [N, Sh + Sw] is 2 MiB there, a 32nd of N².

A product with a row of a table that is not the query's is never added, be it times 0: it may not be finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_lora_device import dot
from .relative_attention_device import head_of, load_rows, products, store_rows


@triton.jit
def line_at(number, H, W, heads, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Return (sample, head, line, places on it, whether there are so many) of a block of queries: places on a line are
    columns of a row of the map or, ACROSS, rows of a column."""
    lines, length = (W, H) if ACROSS else (H, W)
    blocks = tl.cdiv(length, BLOCK)
    places = number % blocks * BLOCK + tl.arange(0, BLOCK)
    line = number // blocks % lines
    which = number // (blocks * lines)
    return tl.cast(which // heads, tl.int64), which % heads, line, tl.minimum(places, length - 1), places < length


@triton.jit
def tokens_of(line, places, W, ACROSS: tl.constexpr):
    """Return the queries' numbers in the map, in 64 bits."""
    return places.to(tl.int64) * W + line if ACROSS else tl.cast(line, tl.int64) * W + places


@triton.jit
def load_line(
    x, strides, sample, head, line, places, ACROSS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    along, other = (strides[1], strides[2]) if ACROSS else (strides[2], strides[1])
    x = head_of(x, strides, sample, head) + tl.cast(line, tl.int64) * other
    return load_rows(x, places.to(tl.int64) * along, D, MAIN, TAIL)


@triton.jit
def load_table(
    table, line, first, size, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return (positions of keys from ``first`` on, the rows of the table for them); past the last that one again."""
    keys = first + tl.arange(0, BLOCK_K)
    rows = line % size + size - 1 - tl.minimum(keys, size - 1)
    return keys, load_rows(table, rows * D, D, MAIN, TAIL)


@triton.jit
def _write_bias(
    q, table, bias, q_strides, size, first, H, W, Sh, Sw, heads, ACROSS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    sample, head, line, places, there = line_at(tl.program_id(0), H, W, heads, ACROSS, BLOCK)
    q_tiles = load_line(q, q_strides, sample, head, line, places, ACROSS, D, MAIN, TAIL)
    bias += (sample * heads + head) * H * W * (Sh + Sw) + first
    offsets = tokens_of(line, places, W, ACROSS)[:, None] * (Sh + Sw)
    for key in range(0, size, BLOCK_K):
        keys, table_tiles = load_table(table, line, key, size, D, MAIN, TAIL, BLOCK_K)
        mask = there[:, None] & (keys < size)[None, :]
        tl.store(bias + offsets + keys[None, :], products(q_tiles, table_tiles, TAIL, PRECISION), mask=mask)


@triton.jit(do_not_specialize=["lines_h", "lines_w"])
def relative_bias_kernel(
    q, rel_h, rel_w, bias, q_strides, lines_h, lines_w, H, W, Sh, Sw, heads,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write bias [B, heads, N, Sh + Sw] of a line's block of queries, of rows or of columns of keys."""
    if tl.program_id(1) == 0:
        if tl.program_id(0) < lines_h:
            _write_bias(
                q, rel_h, bias, q_strides, Sh, 0, H, W, Sh, Sw, heads, False, D, MAIN, TAIL, PRECISION, BLOCK, BLOCK_K
            )  # fmt: skip
    else:
        if tl.program_id(0) < lines_w:
            _write_bias(
                q, rel_w, bias, q_strides, Sw, Sh, H, W, Sh, Sw, heads, True, D, MAIN, TAIL, PRECISION, BLOCK, BLOCK_K
            )  # fmt: skip


@triton.jit
def query_bias_gradient_kernel(
    parts, dbias, table, dq, size, first, H, W, pitch, heads, ACROSS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq = parts + dbias table, of a line's block of queries; ``parts`` and dq are [B, N, heads, D]."""
    sample, head, line, places, there = line_at(tl.program_id(0), H, W, heads, ACROSS, BLOCK)
    tokens = tokens_of(line, places, W, ACROSS)
    dbias += (sample * heads + head) * H * W * pitch + first
    of_head = (sample * H * W * heads + head) * D
    acc, tail = load_rows(parts + of_head, tokens * (heads * D), D, MAIN, TAIL)
    for key in range(0, size, BLOCK_K):
        keys, table_tiles = load_table(table, line, key, size, D, MAIN, TAIL, BLOCK_K)
        pointers = dbias + (tokens * pitch)[:, None] + keys[None, :]
        dbias_tile = tl.load(pointers, mask=(keys < size)[None, :], other=0.0).to(table.dtype.element_ty)
        acc = dot(dbias_tile, table_tiles[0], acc, PRECISION)
        if TAIL:
            tail = dot(dbias_tile, table_tiles[1], tail, PRECISION)
    store_rows(dq + of_head, (acc, tail), tokens * (heads * D), there, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["blocks", "per_program"])
def table_gradient_kernel(
    q, dbias, parts, q_strides, blocks, per_program, size, first, H, W, pitch, heads, ACROSS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of some rows of a table over ``per_program`` blocks of queries: parts [parts, 2 S − 1, D]."""
    rows = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(0) * per_program
    zeros = tl.zeros([BLOCK_K, MAIN], tl.float32)
    no_tail = tl.zeros([BLOCK_K, TAIL if TAIL else 1], tl.float32)
    acc, tail = zeros, no_tail
    for number in range(start, min(start + per_program, blocks)):
        sample, head, line, places, there = line_at(number, H, W, heads, ACROSS, BLOCK)
        q_tiles = load_line(q, q_strides, sample, head, line, places, ACROSS, D, MAIN, TAIL)
        keys = line % size + size - 1 - rows
        is_key = (keys >= 0) & (keys < size)
        pointers = dbias + (sample * heads + head) * H * W * pitch + first
        pointers += (tokens_of(line, places, W, ACROSS) * pitch)[:, None] + keys[None, :]
        dbias_tile = tl.load(pointers, mask=there[:, None] & is_key[None, :], other=0.0).to(q.dtype.element_ty)
        product = dot(tl.trans(dbias_tile), q_tiles[0], zeros, PRECISION)
        acc += tl.where(is_key[:, None], product, 0.0)
        if TAIL:
            product = dot(tl.trans(dbias_tile), q_tiles[1], no_tail, PRECISION)
            tail += tl.where(is_key[:, None], product, 0.0)
    parts += tl.cast(tl.program_id(0), tl.int64) * (2 * size - 1) * D
    store_rows(parts, (acc, tail), rows * D, rows < 2 * size - 1, D, MAIN, TAIL)
