"""Triton implementation of fastcss::affinity_attention: intra = M V and inter = (1 − M) V, M = sigmoid(scale · Q Kᵀ).

Let T = tanh(½ scale · Q Kᵀ). Then intra = ½ (ΣV + T V) and inter = ½ (ΣV − T V): one special-function op per element,
one accumulator for both outputs, nothing to rescale. One Hopper SM does 4096 FLOP and 16 special-function ops per
clock, so an element of T takes 2 (K + D)/4096 clocks on tensor cores and 1/16 on the special-function unit. At K = 64
that is 0.05 and 0.06 for 21 classes, 0.11 and 0.06 for 150, 0.28 and 0.06 for D = 512. Therefore

- a program takes 128 query rows: a byte of an operand from L2 then serves 128 FLOP, which asks for 19 bytes per clock
  at 60% of the peak; 64 rows would ask for twice as much, beyond what L2 gives;
- tiles of up to 160 columns leave room for two programs on an SM: one's tanh runs beside the other's products;
- D = 512 is two column blocks of 256. Each computes S again, 2 (2·64 + 512) FLOP per element against 2 (64 + 512): 11%
  more. One block of 512 would have only 64 rows, as the accumulator is half the register file, and be bound by L2; four
  of 128 would compute 33% more;
- 150 columns are tiles of 128 and 32: 224 products per element, against 320 with one tile of 256;
- one image of 4096 pixels has 32 row blocks for 132 SMs, so programs split the keys too, and leave float32 sums that a
  second kernel adds in a fixed order. The split depends on the sizes of one image, never on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_device import column_total, tanh
from .affinity_tiles import (
    MAX_CHUNKS,
    Columns,
    aligned,
    column_sums,
    combine,
    is_aligned,
    key_blocks_of_split,
    key_columns,
    split_cost,
)
from .multi_lora import _operands_stay_in_shared_memory, precision
from .multi_lora_device import dot, load_tile, store_tile
from .tuned import tuned


@triton.jit
def _add_keys(
    acc, tail, q_tile, k, v, n, left, column, K, D, stride_kn, stride_kk, stride_vn, stride_vd, half_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """(acc, tail) + T V over the keys n..n + BLOCK_N, of which ``left`` are there: all of them unless MASKED."""
    dtype: tl.constexpr = q_tile.dtype
    if not MASKED:
        left = BLOCK_N
    k += tl.cast(n, tl.int64) * stride_kn
    v += tl.cast(n, tl.int64) * stride_vn
    k_tile = load_tile(k, 0, 0, K, left, stride_kk, stride_kn, BLOCK_K, BLOCK_N)
    s = dot(q_tile, k_tile, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32), PRECISION)
    t, _ = tanh(s * half_scale, dtype != tl.float32)
    if MASKED:  # missing keys are 0, and 0 times an infinite query is NaN
        t = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], t, 0.0)
    t = t.to(dtype)
    acc = dot(t, load_tile(v, 0, column, left, D, stride_vn, stride_vd, BLOCK_N, BLOCK_D), acc, PRECISION)
    if BLOCK_TAIL:
        v_tail = load_tile(v, 0, column + BLOCK_D, left, D, stride_vn, stride_vd, BLOCK_N, BLOCK_TAIL)
        tail = dot(t, v_tail, tail, PRECISION)
    return acc, tail


@triton.jit
def _store_halves(
    intra, inter, tile, sums, batch, row, column, N, width, D, batches, chunks, factor, CHUNKS: tl.constexpr
):
    total = column_total(sums, batch, column, batches, chunks, D, CHUNKS, tile.shape[1])[None, :]
    store_tile(intra, (total + tile) * factor, row, column, N, width, width)
    store_tile(inter, (total - tile) * factor, row, column, N, width, width)


@triton.jit(do_not_specialize=["batches"])
def affinity_kernel(
    q, k, v, partial, sums, intra, inter,
    N, K, D, width, batches, splits, split_blocks, chunks,
    stride_qb, stride_qn, stride_qk, stride_kb, stride_kn, stride_kk, stride_vb, stride_vn, stride_vd,
    half_scale, factor, block_width,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, PEELED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """T V of one row block, column block and split of the keys, to ``partial`` [splits, B, N, D] in float32.

    With one split, ``partial`` may be None: then intra and inter are written at once.
    """
    # Row blocks come first, so that programs which run together read the same keys and values.
    blocks = tl.cdiv(N, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks % splits
    batch = tl.program_id(0) // (blocks * splits)
    column = tl.program_id(1) * block_width
    batch64 = tl.cast(batch, tl.int64)
    q += batch64 * stride_qb
    k += batch64 * stride_kb
    v += batch64 * stride_vb
    first = split * split_blocks * BLOCK_N
    last = min(first + split_blocks * BLOCK_N, N)
    # The last keys are taken after the loop (PEELED), which then needs no masks. If operands go through registers, the
    # tile of q stays in them for both, so it has to be small.
    whole = first + (last - first) // BLOCK_N * BLOCK_N if PEELED else last

    q_tile = load_tile(q, row, 0, N, K, stride_qn, stride_qk, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tail = tl.zeros([BLOCK_M, BLOCK_TAIL if BLOCK_TAIL else 1], tl.float32)
    for n in range(first, whole, BLOCK_N):
        acc, tail = _add_keys(
            acc, tail, q_tile, k, v, n, last - n, column, K, D, stride_kn, stride_kk, stride_vn, stride_vd, half_scale,
            not PEELED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    if PEELED:  # noqa: SIM102  known to the compiler
        if whole < last:
            acc, tail = _add_keys(
                acc, tail, q_tile, k, v, whole, last - whole, column, K, D, stride_kn, stride_kk, stride_vn, stride_vd,
                half_scale, True, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_TAIL,
            )  # fmt: skip

    if partial is None:
        intra += batch64 * N * width
        inter += batch64 * N * width
        _store_halves(intra, inter, acc, sums, batch, row, column, N, width, D, batches, chunks, factor, CHUNKS)
        if BLOCK_TAIL:
            _store_halves(
                intra, inter, tail, sums, batch, row, column + BLOCK_D, N, width, D, batches, chunks, factor, CHUNKS
            )
    else:
        partial += (tl.cast(split, tl.int64) * batches + batch) * N * D
        store_tile(partial, acc, row, column, N, D, D)
        if BLOCK_TAIL:
            store_tile(partial, tail, row, column + BLOCK_D, N, D, D)


@tuned("BLOCK_M", "BLOCK_N")
def affinity_tile(key_width: int, columns: Columns, dtype: torch.dtype) -> dict[str, int]:
    block_k = triton.next_power_of_2(key_width)
    peeled = dtype != torch.float32 and (block_k <= 64 or _operands_stay_in_shared_memory())
    if dtype == torch.float32:
        m, n, warps, stages = 64, 64 if block_k <= 64 else 32, 8, 2
    elif not _operands_stay_in_shared_memory():
        m, n, warps, stages = 128, 32, 8, 2
    elif not two_on_a_multiprocessor(block_k, columns):
        m, n, warps, stages = 128, 64, 8, 2
    elif columns.width <= 128:
        m, n, warps, stages = 128, 64 if columns.width <= 64 and block_k <= 128 else 32, 8, 3 if block_k <= 128 else 2
    else:  # two programs of 4 warps instead of one of 8: 255 registers per thread, and no barrier between their tanhs
        m, n, warps, stages = 128, 32, 4, 3
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": block_k, "BLOCK_D": columns.main, "BLOCK_TAIL": columns.tail,
        "PEELED": peeled, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def two_on_a_multiprocessor(block_k: int, columns: Columns) -> bool:
    """Tell whether registers and shared memory of a Hopper SM can hold two programs."""
    return columns.width <= (160 if block_k <= 64 else 128 if block_k <= 128 else 64)


def value_columns(width: int, key_width: int, dtype: torch.dtype) -> Columns:
    """Choose column blocks; they are narrower if operands go through registers, as in float32 and before Hopper."""
    if dtype != torch.float32 and _operands_stay_in_shared_memory():
        return Columns.of(width, 256)
    return Columns.of(width, 64 if dtype == torch.float32 or key_width > 128 else 128)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, columns: Columns, scale: float, factor: float,
    outputs: tuple[Tensor, Tensor] | None,
) -> Tensor | None:  # fmt: skip
    """Compute T V as float32 parts [splits, B, N, D]; or write ``outputs`` and return None if one split is enough."""
    (batches, pixels, key_width), width = q.shape, columns.total
    tile = affinity_tile(key_width, columns, q.dtype)
    row_blocks, key_blocks = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(pixels, tile["BLOCK_N"])
    split_blocks = key_blocks_of_split(
        row_blocks * columns.count, key_blocks, split_cost(pixels, key_width, width),
        2 if two_on_a_multiprocessor(tile["BLOCK_K"], columns) else 1,
    )  # fmt: skip
    splits = triton.cdiv(key_blocks, split_blocks)
    whole = splits == 1 and outputs is not None
    partial = None if whole else q.new_empty(splits, batches, pixels, width, dtype=torch.float32)
    intra, inter = outputs if whole else (None, None)
    affinity_kernel[batches * splits * row_blocks, columns.count](
        q, k, v, partial, sums, intra, inter,
        pixels, key_width, width, outputs[0].shape[2] if whole else width, batches, splits, split_blocks,
        0 if sums is None else sums.shape[0],
        *q.stride(), *k.stride(), *v.stride(), 0.5 * scale, factor, columns.width,
        CHUNKS=MAX_CHUNKS, PRECISION=precision(q.dtype), **tile,
    )  # fmt: skip
    return partial


def affinity_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mean: bool) -> tuple[Tensor, Tensor]:
    intra, inter = v.new_empty(v.shape), v.new_empty(v.shape)
    if not intra.numel():
        return intra, inter
    factor = 0.5 / v.shape[1] if mean else 0.5
    key_width = key_columns("affinity_attention", q)
    columns = value_columns(v.shape[2], key_width, v.dtype)
    with torch.cuda.device_of(q):
        copy = not is_aligned(v, columns.total)
        sums, padded = column_sums(v, None, columns.total, copy)
        v = padded if copy else v
        q, k = aligned(q, key_width), aligned(k, key_width)
        partial = attend(q, k, v, sums, columns, scale, factor, (intra, inter))
        if partial is not None:
            combine(partial, sums, intra, inter, factor)
    return intra, inter


LIBRARY.impl("affinity_attention.triton", affinity_attention, "CompositeExplicitAutograd")
