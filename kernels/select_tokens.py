"""Triton implementation of fastcss::select_tokens: cosines, their best class, and the tokens of each class in order.

There are 2 N D bytes of tokens and 2 N C D FLOP. At C = 20 reading the tokens is the limit, some microseconds, so the
number of launches counts. There are two. The first multiplies a block of tokens with all classes; the squares of the
same tiles give the lengths. It leaves the best class of each token, a bit for each class with which the token reaches
the threshold, and for each class how many tokens of the block it has, how many reach it, and the sum of their cosines.
A program of the second owns one place of one class: from the running count over blocks it finds the block, in it the
token, and copies its row, or zeros if the class has no such token. Each place fetches its token, so there is nothing to
order by atomics, and nothing is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .multi_lora import precision, rank_block
from .multi_lora_device import dot, load_tile
from .tuned import tuned

SMALLEST = tl.constexpr(1e-12)  # shorter rows count as this long
BLOCK_N = 64  # tokens that are counted together
BLOCKS = tl.constexpr(512)  # counts of so many blocks of tokens are summed at a time


@triton.jit
def clamped_root(squares):
    return tl.maximum(tl.sqrt(squares), SMALLEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_bits(above, reaches, left, c, C):
    """Store the words of a block of tokens, of which ``left`` exist, with a bit for each of the classes c …."""
    WORDS: tl.constexpr = (reaches.shape[1] + 31) // 32
    classes = tl.arange(0, reaches.shape[1])
    bits = reaches.to(tl.int32) << (classes % 32)[None, :]
    rows, count = tl.arange(0, reaches.shape[0]), tl.cdiv(C, 32)
    for word in tl.static_range(WORDS):
        of_word = bits if WORDS == 1 else tl.where((classes // 32 == word)[None, :], bits, 0)
        place = rows * count + c // 32 + word
        tl.store(above + place, tl.sum(of_word, 1), mask=rows < tl.where(c // 32 + word < count, left, 0))


@triton.jit
def best_class_kernel(
    tokens, classes, best, above, block_counts, block_support, block_sums,
    N, C, D, threshold, stride_tb, stride_tn, stride_td, stride_cb, stride_cc, stride_cd,
    BEST_ONLY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write best [B, N] and above [B, N, words]; and for each block of tokens, [B, C, blocks], how many survive for a
    class, how many it averages, and the sum of their cosines. BLOCK_C is a multiple of 32 or at least C, so that no two
    blocks share a word."""
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n = block * BLOCK_N
    tokens += batch * stride_tb
    classes += batch * stride_cb
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    highest_class = tl.zeros([BLOCK_N], tl.int32)
    for c in range(0, C, BLOCK_C):
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        token_squares = tl.zeros([BLOCK_N], tl.float32)
        class_squares = tl.zeros([BLOCK_C], tl.float32)
        for d in range(0, D, BLOCK_D):
            t_tile = load_tile(tokens, n, d, N, D, stride_tn, stride_td, BLOCK_N, BLOCK_D)
            c_tile = load_tile(classes, d, c, D, C, stride_cd, stride_cc, BLOCK_D, BLOCK_C)
            acc = dot(t_tile, c_tile, acc, PRECISION)
            t_wide, c_wide = t_tile.to(tl.float32), c_tile.to(tl.float32)
            token_squares += tl.sum(t_wide * t_wide, 1)
            class_squares += tl.sum(c_wide * c_wide, 0)
        value = acc / clamped_root(token_squares)[:, None] / clamped_root(class_squares)[None, :]
        columns = c + tl.arange(0, BLOCK_C)
        there = (columns < C)[None, :] & (value == value)
        if not BEST_ONLY:
            reaches = there & (value >= threshold) & (n + tl.arange(0, BLOCK_N) < N)[:, None]
            first = (batch * C + c) * blocks + block
            place = tl.arange(0, BLOCK_C) * blocks
            tl.store(block_support + first + place, tl.sum(reaches.to(tl.int32), 0), mask=columns < C)
            tl.store(block_sums + first + place, tl.sum(tl.where(reaches, value, 0.0), 0), mask=columns < C)
            _store_bits(above + (batch * N + n) * tl.cdiv(C, 32), reaches, N - n, c, C)
        value, column = tl.max(tl.where(there, value, float("-inf")), 1, return_indices=True)
        better = value > highest
        highest, highest_class = tl.where(better, value, highest), tl.where(better, c + column, highest_class)
    rows = n + tl.arange(0, BLOCK_N)
    survives = (highest >= threshold) & (rows < N)
    chosen = tl.where(survives, highest_class, -1)
    tl.store(best + batch * N + rows, chosen, mask=rows < N)
    for c in range(0, C, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        is_class = chosen[:, None] == columns[None, :]
        place = (batch * C + columns) * blocks + block
        tl.store(block_counts + place, tl.sum(is_class.to(tl.int32), 0), mask=columns < C)
        if BEST_ONLY:
            tl.store(block_sums + place, tl.sum(tl.where(is_class, highest[:, None], 0.0), 0), mask=columns < C)


@triton.jit
def find_token(best, block_counts, c, place, N, blocks, BLOCK_N: tl.constexpr):
    """Find the token at ``place`` of those that survive for class c, or N if there is none; pointers are the
    image's."""
    offsets = tl.arange(0, BLOCKS)
    before = 0  # tokens in blocks that were looked at
    found = -1
    rank = 0  # in the block that was found
    for first in range(0, blocks, BLOCKS):
        counts = tl.load(block_counts + first + offsets, mask=first + offsets < blocks, other=0)
        upto = before + tl.cumsum(counts, 0)
        holds = (place < upto) & (place >= upto - counts)
        here = tl.max(tl.where(holds, first + offsets, -1), 0)
        rank = tl.where(here >= 0, place - tl.sum(tl.where(holds, upto - counts, 0), 0), rank)
        found = tl.maximum(found, here)
        before += tl.sum(counts, 0)
    rows = found * BLOCK_N + tl.arange(0, BLOCK_N)
    of_class = tl.load(best + rows, mask=(rows >= 0) & (rows < N), other=-1) == c
    index = tl.cumsum(of_class.to(tl.int32), 0) - 1
    return tl.min(tl.where(of_class & (index == rank), rows, N), 0)


@triton.jit
def copy_selected_kernel(
    tokens, best, block_counts, block_support, block_sums, selected, counts, presence, support,
    N, C, D, length, blocks, places, stride_tb, stride_tn, stride_td, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one place of one class in ``selected`` [B, C, length]; the first also writes its counts and presence."""
    place = tl.program_id(0) % places
    per_class = tl.cast(tl.program_id(0) // places, tl.int64)
    batch, c = per_class // C, per_class % C
    block_counts += per_class * blocks
    token = find_token(best + batch * N, block_counts, c, place, N, blocks, BLOCK_N)
    row = tokens + batch * stride_tb + tl.cast(token, tl.int64) * stride_tn
    selected += per_class * length + tl.cast(place, tl.int64) * D
    for d in range(0, D, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)
        value = tl.load(row + columns.to(tl.int64) * stride_td, mask=columns < tl.where(token < N, D, 0), other=0.0)
        fits = (columns < D) & (columns < length - tl.cast(place, tl.int64) * D)
        tl.store(selected + columns, value, mask=fits)
    if place == 0:
        offsets = tl.arange(0, BLOCKS)
        count = tl.zeros([BLOCKS], tl.int32)
        averaged = tl.zeros([BLOCKS], tl.int32)
        total = tl.zeros([BLOCKS], tl.float32)
        for first in range(0, blocks, BLOCKS):
            there = first + offsets < blocks
            count += tl.load(block_counts + first + offsets, mask=there, other=0)
            averaged += tl.load(block_support + per_class * blocks + first + offsets, mask=there, other=0)
            total += tl.load(block_sums + per_class * blocks + first + offsets, mask=there, other=0.0)
        tl.store(counts + per_class, tl.sum(count, 0).to(tl.int64))
        number = tl.sum(averaged, 0)
        tl.store(support + per_class, number.to(tl.int64))
        mean = tl.sum(total, 0) / tl.maximum(number, 1).to(tl.float32)
        tl.store(presence + per_class, mean.to(presence.dtype.element_ty))


@tuned("BLOCK_C", "BLOCK_D")
def score_tile(classes: int, dtype: torch.dtype) -> dict[str, int]:
    c, d, warps = (32, 16, 4) if dtype == torch.float32 else (128, 64, 8)
    block_c = rank_block(classes, c)
    return {"BLOCK_N": BLOCK_N, "BLOCK_C": block_c, "BLOCK_D": d, "num_warps": warps, "num_stages": 3}


def select_tokens(
    tokens: Tensor, classes: Tensor, threshold: float, length: int, best_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batches, count, depth), class_count = tokens.shape, classes.shape[1]
    selected = tokens.new_empty(batches, class_count, length)
    counts, support = (tokens.new_empty((batches, class_count), dtype=torch.int64) for _ in range(2))
    presence = tokens.new_empty(batches, class_count)
    best = tokens.new_empty((batches, count), dtype=torch.int32)
    above = best.new_empty(batches, count, 0 if best_only else triton.cdiv(class_count, 32))
    blocks, places = triton.cdiv(count, BLOCK_N), triton.cdiv(length, depth)
    block_counts = tokens.new_empty((batches, class_count, blocks), dtype=torch.int32)
    block_support = block_counts if best_only else torch.empty_like(block_counts)
    block_sums = tokens.new_empty((batches, class_count, blocks), dtype=torch.float32)
    tile = score_tile(class_count, tokens.dtype)
    tile = tile | {"BLOCK_C": max(tile["BLOCK_C"], rank_block(class_count, 32))}
    with torch.cuda.device_of(tokens):
        if batches * blocks:
            best_class_kernel[(batches * blocks,)](
                tokens, classes, best, above, block_counts, block_support, block_sums,
                count, class_count, depth, threshold, *tokens.stride(), *classes.stride(),
                BEST_ONLY=best_only, PRECISION=precision(tokens.dtype), **tile,
            )  # fmt: skip
        if batches:
            copy_selected_kernel[(batches * class_count * places,)](
                tokens, best, block_counts, block_support, block_sums, selected, counts, presence, support,
                count, class_count, depth, length, blocks, places, *tokens.stride(),
                BLOCK_N=BLOCK_N, BLOCK_D=256, num_warps=4,
            )  # fmt: skip
    return selected, counts, presence, support, best, above


LIBRARY.impl("select_tokens.triton", select_tokens, "CompositeExplicitAutograd")
