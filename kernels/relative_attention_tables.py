"""The products of fastcss::relative_attention with its tables: the bias of a query, and the gradients through it.

A query at position p of a window has the number q · table[p − s + S − 1] for each position s of the keys. All kernels
here multiply a tile of queries with rows r of the table and take the number of s = p + S − 1 − r from that, or put it
there, where there is such an s: half of the products are of use, and 2 N (4 S − 2) D FLOP in all are 3% of the
attention's at S = 64. A head's bias [N, Sh + Sw] is 2 MiB at 64², a 32nd of N². The attention could make it from q
itself, but a row of queries there meets keys in rows, and here tables at distances: that is a gather, which costs it
the registers that it has for the softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_lora_device import dot
from .relative_attention_device import head_of, load_rows, products, store_rows


@triton.jit
def tokens_at(blocks, N, heads, BLOCK: tl.constexpr):
    """Return (tokens of a block, whether there are so many, sample, head)."""
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(0) // blocks
    return tl.minimum(tokens, N - 1), tokens < N, tl.cast(which // heads, tl.int64), which % heads


@triton.jit
def load_tokens(x, strides, tokens, sample, head, W, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    offsets = (tokens // W).to(tl.int64) * strides[1] + (tokens % W).to(tl.int64) * strides[2]
    return load_rows(head_of(x, strides, sample, head), offsets, D, MAIN, TAIL)


@triton.jit
def place_of(tokens, there, rows, W, Sh, Sw, COLUMNS: tl.constexpr):
    """Return offsets [tokens, rows] of a bias and whether there is a number that comes from this row of the table, of
    the columns' or of the rows'."""
    if COLUMNS:
        size, position, first = Sw, tokens % W % Sw, Sh
    else:
        size, position, first = Sh, tokens // W % Sh, 0
    key = position[:, None] + (size - 1) - rows[None, :]
    offsets = tokens.to(tl.int64)[:, None] * (Sh + Sw) + (first + key)
    return offsets, there[:, None] & (key >= 0) & (key < size)


@triton.jit
def load_table(table, first, size, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return (rows from ``first`` on, both tiles of them); a row past the last is that one again."""
    rows = first + tl.arange(0, BLOCK_R)
    return rows, load_rows(table, tl.minimum(rows, 2 * size - 2) * D, D, MAIN, TAIL)


@triton.jit
def _write_bias(
    bias, q_tiles, table, size, tokens, there, W, Sh, Sw, COLUMNS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    for r in range(0, 2 * size - 1, BLOCK_R):
        rows, table_tiles = load_table(table, r, size, D, MAIN, TAIL, BLOCK_R)
        offsets, mask = place_of(tokens, there, rows, W, Sh, Sw, COLUMNS)
        tl.store(bias + offsets, products(q_tiles, table_tiles, TAIL, PRECISION), mask=mask)


@triton.jit
def relative_bias_kernel(
    q, rel_h, rel_w, bias, q_strides, N, W, Sh, Sw, heads,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write bias [B, heads, N, Sh + Sw] of a block of queries."""
    tokens, there, sample, head = tokens_at(tl.cdiv(N, BLOCK), N, heads, BLOCK)
    q_tiles = load_tokens(q, q_strides, tokens, sample, head, W, D, MAIN, TAIL)
    bias += (sample * heads + head) * N * (Sh + Sw)
    _write_bias(bias, q_tiles, rel_h, Sh, tokens, there, W, Sh, Sw, False, D, MAIN, TAIL, PRECISION, BLOCK_R)
    _write_bias(bias, q_tiles, rel_w, Sw, tokens, there, W, Sh, Sw, True, D, MAIN, TAIL, PRECISION, BLOCK_R)


@triton.jit
def _add_bias_gradient(
    acc, tail, dbias, table, size, tokens, there, W, Sh, Sw, COLUMNS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    for r in range(0, 2 * size - 1, BLOCK_R):
        rows, table_tiles = load_table(table, r, size, D, MAIN, TAIL, BLOCK_R)
        offsets, mask = place_of(tokens, there, rows, W, Sh, Sw, COLUMNS)
        dbias_tile = tl.load(dbias + offsets, mask=mask, other=0.0).to(table.dtype.element_ty)
        acc = dot(dbias_tile, table_tiles[0], acc, PRECISION)
        if TAIL:
            tail = dot(dbias_tile, table_tiles[1], tail, PRECISION)
    return acc, tail


@triton.jit
def query_bias_gradient_kernel(
    parts, dbias, rel_h, rel_w, dq, N, W, Sh, Sw, heads,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add what comes through the bias to what came through the products, ``parts`` [B, N, heads, D] in float32."""
    tokens, there, sample, head = tokens_at(tl.cdiv(N, BLOCK), N, heads, BLOCK)
    dbias += (sample * heads + head) * N * (Sh + Sw)
    first = (sample * N * heads + head) * D
    offsets = tokens.to(tl.int64) * (heads * D)
    acc, tail = load_rows(parts + first, offsets, D, MAIN, TAIL)
    acc, tail = _add_bias_gradient(
        acc, tail, dbias, rel_h, Sh, tokens, there, W, Sh, Sw, False, D, MAIN, TAIL, PRECISION, BLOCK_R
    )  # fmt: skip
    acc, tail = _add_bias_gradient(
        acc, tail, dbias, rel_w, Sw, tokens, there, W, Sh, Sw, True, D, MAIN, TAIL, PRECISION, BLOCK_R
    )  # fmt: skip
    store_rows(dq + first, (acc, tail), offsets, there, D, MAIN, TAIL)


@triton.jit
def _sum_table_gradient(
    parts, q, dbias, q_strides, size, r, first, last, blocks, N, W, Sh, Sw, heads, COLUMNS: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = r + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, MAIN], tl.float32)
    tail = tl.zeros([BLOCK_R, TAIL if TAIL else 1], tl.float32)
    for number in range(first, last):
        tokens = number % blocks * BLOCK + tl.arange(0, BLOCK)
        there = tokens < N
        tokens = tl.minimum(tokens, N - 1)
        which = tl.cast(number // blocks, tl.int64)
        q_tiles = load_tokens(q, q_strides, tokens, which // heads, which % heads, W, D, MAIN, TAIL)
        offsets, mask = place_of(tokens, there, rows, W, Sh, Sw, COLUMNS)
        dbias_tile = tl.load(dbias + which * N * (Sh + Sw) + offsets, mask=mask, other=0.0).to(q.dtype.element_ty)
        acc = dot(tl.trans(dbias_tile), q_tiles[0], acc, PRECISION)
        if TAIL:
            tail = dot(tl.trans(dbias_tile), q_tiles[1], tail, PRECISION)
    parts += tl.cast(tl.program_id(0), tl.int64) * (2 * size - 1) * D
    store_rows(parts, (acc, tail), rows * D, rows < 2 * size - 1, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["blocks_of_all", "per_program"])
def table_gradient_kernel(
    q, dbias, parts_h, parts_w, q_strides, blocks_of_all, per_program, N, W, Sh, Sw, heads,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of some rows of a table over ``per_program`` blocks of queries to a part of parts_h or
    parts_w [parts, 2 S − 1, D]."""
    first = tl.program_id(0) * per_program
    last = min(first + per_program, blocks_of_all)
    r = tl.program_id(1) * BLOCK_R
    of_rows = tl.cdiv(2 * Sh - 1, BLOCK_R) * BLOCK_R
    if r < of_rows:
        _sum_table_gradient(
            parts_h, q, dbias, q_strides, Sh, r, first, last, tl.cdiv(N, BLOCK), N, W, Sh, Sw, heads, False,
            D, MAIN, TAIL, PRECISION, BLOCK, BLOCK_R,
        )  # fmt: skip
    else:
        _sum_table_gradient(
            parts_w, q, dbias, q_strides, Sw, r - of_rows, first, last, tl.cdiv(N, BLOCK), N, W, Sh, Sw, heads, True,
            D, MAIN, TAIL, PRECISION, BLOCK, BLOCK_R,
        )  # fmt: skip
