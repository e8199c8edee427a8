"""Triton implementation of fastcss::top_classes: the k best of each row, in order.

A score and its place become one int64 that sorts as they do, so that all keys differ and there are no ties. One program
does a bitonic top-k of a row of up to ROW keys in registers; every block of a longer row gives its k best keys, and
those are gone through again. 4 bytes per score are read once, so latency is what counts: one launch for the class
counts of a data set, two for 20,000 and k ≤ 128, three at k = 512. The library sorts the row for more than MAX_K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY

ROW = 4096  # keys that one program holds in registers
BLOCK = 1024  # keys in each block of a longer row
MAX_K = 1024
LAST = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def sortable(x):
    """Map float32 to int32 of the same order, both zeros alike and NaN above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, LAST, bits ^ ((bits >> 31) & LAST))


@triton.jit
def _exchange(x, STRIDE: tl.constexpr, RUN: tl.constexpr):
    """Put keys STRIDE apart in order: falling in even runs of RUN keys, rising in odd ones."""
    shape: tl.constexpr = [x.shape[0] // (2 * STRIDE), 2, STRIDE]
    pairs = tl.reshape(x, shape)
    partner = tl.sum(pairs, 1, keep_dims=True) - pairs  # exact: integers wrap around
    place = tl.reshape(tl.arange(0, x.shape[0]), shape)
    wants_larger = (place & STRIDE == 0) == (place & RUN == 0)
    return tl.reshape(tl.where((pairs < partner) == wants_larger, partner, pairs), [x.shape[0]])


@triton.jit
def _larger_of_runs(x, RUN: tl.constexpr):
    """Take the larger of each two keys of a falling run and a rising one: the RUN largest, in a bitonic order."""
    half: tl.constexpr = x.shape[0] // 2
    return tl.reshape(tl.max(tl.reshape(x, [half // RUN, 2, RUN]), 1), [half])


@triton.jit
def top_keys(x, LOG_K: tl.constexpr, LOG_HALVINGS: tl.constexpr):
    """Return the K largest of x, the largest first, by a bitonic sort of runs of K and of the larger halves of two
    runs.

    tl.topk does the same, but the interpreter runs it element by element.
    """
    for i in tl.static_range(1, LOG_K + 1):
        for j in tl.static_range(i):
            x = _exchange(x, 1 << (i - 1 - j), 1 << i)
    for _ in tl.static_range(LOG_HALVINGS):
        x = _larger_of_runs(x, 1 << LOG_K)
        for j in tl.static_range(LOG_K):
            x = _exchange(x, 1 << (LOG_K - 1 - j), 1 << LOG_K)
    return x


@triton.jit
def top_classes_kernel(
    score, candidates, keys, best, index,
    width, blocks, k, stride_b, stride_t,
    LOG_K: tl.constexpr, LOG_HALVINGS: tl.constexpr,
):  # fmt: skip
    """Find the K best of each block of K · 2^LOG_HALVINGS in a row: of scores, or of keys ``candidates`` [B, width].

    They go to ``keys`` [B, blocks, K]; or to best and index [B, k] if that is None, and then the row is one block.
    """
    K: tl.constexpr = 1 << LOG_K
    BLOCK: tl.constexpr = K << LOG_HALVINGS
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    place = block * BLOCK + tl.arange(0, BLOCK)
    score += tl.cast(row, tl.int64) * stride_b
    if candidates is None:
        values = tl.load(score + place.to(tl.int64) * stride_t, mask=place < width, other=0.0).to(tl.float32)
        key = (sortable(values).to(tl.int64) << 32) | (place ^ LAST).to(tl.int64)  # of equal scores the first is larger
        key = tl.where(place < width, key, LOWEST)
    else:
        key = tl.load(candidates + tl.cast(row, tl.int64) * width + place, mask=place < width, other=LOWEST)
    top = top_keys(key, LOG_K, LOG_HALVINGS)
    ranks = tl.arange(0, K)
    if keys is not None:
        tl.store(keys + (tl.cast(row, tl.int64) * blocks + block) * K + ranks, top)
    else:
        classes = (top & LAST) ^ LAST
        out = tl.cast(row, tl.int64) * k + ranks
        tl.store(index + out, classes, mask=ranks < k)
        values = tl.load(score + classes * stride_t, mask=ranks < k)
        tl.store(best + out, values.to(best.dtype.element_ty), mask=ranks < k)


def best_of_rows(score: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the k best of score [B, T] and their places. Scores are compared before they are rounded to ``dtype``."""
    rows, width = score.shape
    if k > MAX_K:
        best, index = score.sort(dim=1, descending=True, stable=True)
        return best[:, :k].to(dtype, memory_format=torch.contiguous_format), index[:, :k].contiguous()
    best, index = score.new_empty((rows, k), dtype=dtype), score.new_empty((rows, k), dtype=torch.int64)
    if not best.numel():
        return best, index
    padded_k = triton.next_power_of_2(k)
    block, candidates = max(BLOCK, 4 * padded_k), None
    while width > ROW:
        blocks = triton.cdiv(width, block)
        keys = score.new_empty((rows, blocks * padded_k), dtype=torch.int64)
        _launch(score, candidates, keys, best, index, width, block, padded_k)
        candidates, width = keys, blocks * padded_k
    _launch(score, candidates, None, best, index, width, max(triton.next_power_of_2(width), padded_k, 16), padded_k)
    return best, index


def log2(power_of_2: int) -> int:
    return power_of_2.bit_length() - 1


def _launch(score, candidates, keys, best, index, width: int, block: int, padded_k: int) -> None:
    blocks = triton.cdiv(width, block)
    top_classes_kernel[(len(score) * blocks,)](
        score, candidates, keys, best, index, width, blocks, best.shape[1], *score.stride(),
        LOG_K=log2(padded_k), LOG_HALVINGS=log2(block // padded_k), num_warps=4 if block <= BLOCK else 8,
    )  # fmt: skip


def top_classes(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(score):
        return best_of_rows(score, k, score.dtype)


LIBRARY.impl("top_classes.triton", top_classes, "CompositeExplicitAutograd")
