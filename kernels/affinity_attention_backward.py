"""Triton implementation of fastcss::affinity_attention_backward.

Let T = tanh(½ s), s = scale · q_i · k_j, E = ½ (dintra − dinter), and f = 1, or 1/N if the mean was taken:

    dT_ij = E_i · v_j,   ds_ij = ½ f scale (1 − T_ij²) dT_ij,   dq_i = Σ_j ds_ij k_j,   dk_j = Σ_i ds_ij q_i
    dv_j = f (Σ_i T_ij E_i + Σ_i ½ (dintra + dinter)_i)

Two passes use one kernel, over query blocks for dq and over key blocks for dk and dv: swapping q with k and E with v
turns dq into dk. Nothing is atomic. Each pass computes T and dT, so together they take 2 (4 K + 3 D) FLOP per element
of T, instead of the 2 (3 K + 2 D) of one pass that would add dq atomically, in another order every time.

ds is linear in dT, and dT is a sum over value columns: more than 256 of them are cut into column blocks, whose dq and
dk are added like those of the splits. For D = 512 and K = 64 that computes S twice more, 13% of all. f stays out of E
and of ds because 1/N would leave little of them in float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_attention import value_columns
from .affinity_device import tanh
from .affinity_tiles import Columns, aligned, column_sums, combine, key_blocks_of_split, key_columns, split_cost
from .multi_lora import _operands_stay_in_shared_memory, precision
from .multi_lora_device import dot, load_tile, store_tile
from .tuned import tuned


@triton.jit
def _add_columns(
    dx, dv, dv_tail, x_tile, a_tile, a_tail, y, b, n, left, column, K, D,
    stride_yn, stride_yk, stride_bn, stride_bd, half_scale,
    MASKED: tl.constexpr, WITH_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """(dx + (1 − T²) dT y, dv + T b) over n..n + BLOCK_N, of which ``left`` are there: all of them unless MASKED."""
    dtype: tl.constexpr = x_tile.dtype
    if not MASKED:
        left = BLOCK_N
    y += tl.cast(n, tl.int64) * stride_yn
    b += tl.cast(n, tl.int64) * stride_bn
    zeros = tl.zeros([x_tile.shape[0], BLOCK_N], tl.float32)
    y_tile = load_tile(y, 0, 0, left, K, stride_yn, stride_yk, BLOCK_N, BLOCK_K)
    t, slope = tanh(dot(x_tile, tl.trans(y_tile), zeros, PRECISION) * half_scale, dtype != tl.float32)
    b_tile = load_tile(b, 0, column, left, D, stride_bn, stride_bd, BLOCK_N, BLOCK_D)
    dt = dot(a_tile, tl.trans(b_tile), zeros, PRECISION)
    if BLOCK_TAIL:
        b_tail = load_tile(b, 0, column + BLOCK_D, left, D, stride_bn, stride_bd, BLOCK_N, BLOCK_TAIL)
        dt = dot(a_tail, tl.trans(b_tail), dt, PRECISION)
    if MASKED:  # missing elements are 0, and 0 times an infinite x is NaN
        there = (tl.arange(0, BLOCK_N) < left)[None, :]
        t, slope = tl.where(there, t, 0.0), tl.where(there, slope, 0.0)
    dx = dot((slope * dt).to(dtype), y_tile, dx, PRECISION)
    if WITH_DV:
        dv = dot(t.to(dtype), b_tile, dv, PRECISION)
        if BLOCK_TAIL:
            dv_tail = dot(t.to(dtype), b_tail, dv_tail, PRECISION)
    return dx, dv, dv_tail


@triton.jit(do_not_specialize=["batches"])
def affinity_gradient_kernel(
    x, y, a, b, dx, dv,
    N, K, D, batches, splits, split_blocks,
    stride_xb, stride_xn, stride_xk, stride_yb, stride_yn, stride_yk,
    stride_ab, stride_an, stride_ad, stride_bb, stride_bn, stride_bd, half_scale, block_width,
    WITH_DV: tl.constexpr, PRECISION: tl.constexpr, PEELED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """dx = Σ_j (1 − T_ij²) (a_i · b_j) y_j [column blocks · splits, B, N, K], dv = Σ_j T_ij b_j [splits, B, N, D]."""
    blocks = tl.cdiv(N, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks % splits
    batch = tl.program_id(0) // (blocks * splits)
    column = tl.program_id(1) * block_width
    batch64 = tl.cast(batch, tl.int64)
    x += batch64 * stride_xb
    y += batch64 * stride_yb
    a += batch64 * stride_ab
    b += batch64 * stride_bb
    first = split * split_blocks * BLOCK_N
    last = min(first + split_blocks * BLOCK_N, N)
    whole = first + (last - first) // BLOCK_N * BLOCK_N if PEELED else last

    x_tile = load_tile(x, row, 0, N, K, stride_xn, stride_xk, BLOCK_M, BLOCK_K)
    a_tile = load_tile(a, row, column, N, D, stride_an, stride_ad, BLOCK_M, BLOCK_D)
    a_tail = a_tile
    if BLOCK_TAIL:
        a_tail = load_tile(a, row, column + BLOCK_D, N, D, stride_an, stride_ad, BLOCK_M, BLOCK_TAIL)
    x_sum = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    v_sum = tl.zeros([BLOCK_M, BLOCK_D if WITH_DV else 1], tl.float32)
    v_tail = tl.zeros([BLOCK_M, BLOCK_TAIL if WITH_DV and BLOCK_TAIL else 1], tl.float32)
    for n in range(first, whole, BLOCK_N):
        x_sum, v_sum, v_tail = _add_columns(
            x_sum, v_sum, v_tail, x_tile, a_tile, a_tail, y, b, n, last - n, column, K, D,
            stride_yn, stride_yk, stride_bn, stride_bd, half_scale,
            not PEELED, WITH_DV, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    if PEELED:  # noqa: SIM102  known to the compiler
        if whole < last:
            x_sum, v_sum, v_tail = _add_columns(
                x_sum, v_sum, v_tail, x_tile, a_tile, a_tail, y, b, whole, last - whole, column, K, D,
                stride_yn, stride_yk, stride_bn, stride_bd, half_scale,
                True, WITH_DV, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_TAIL,
            )  # fmt: skip

    part = tl.cast(tl.program_id(1) * splits + split, tl.int64)
    store_tile(dx + (part * batches + batch) * N * K, x_sum, row, 0, N, K, K)
    if WITH_DV:
        dv += (tl.cast(split, tl.int64) * batches + batch) * N * D
        store_tile(dv, v_sum, row, column, N, D, D)
        if BLOCK_TAIL:
            store_tile(dv, v_tail, row, column + BLOCK_D, N, D, D)


@tuned("BLOCK_M", "BLOCK_N")
def gradient_tile(key_width: int, columns: Columns, dtype: torch.dtype, with_dv: bool) -> dict[str, int]:
    block_k = triton.next_power_of_2(key_width)
    in_shared_memory = dtype != torch.float32 and _operands_stay_in_shared_memory()
    peeled = in_shared_memory or (dtype != torch.float32 and block_k + columns.width <= 160)  # see affinity_kernel
    if dtype == torch.float32:
        m, n, warps, stages = 32, 32, 8, 1
    elif not in_shared_memory:
        m, n, warps, stages = 64 if block_k <= 128 else 32, 32, 8, 2
    elif with_dv and block_k + columns.width > 320:
        m, n, warps, stages = 64, 32, 8, 2
    else:
        m, n, warps, stages = 128, 32, 8, 2
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": block_k, "BLOCK_D": columns.main, "BLOCK_TAIL": columns.tail,
        "PEELED": peeled, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def gradients(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, columns: Columns, scale: float, with_dv: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the float32 parts of dx, and of dv if it is wanted: see affinity_gradient_kernel."""
    (batches, pixels, key_width), width = x.shape, columns.total
    tile = gradient_tile(key_width, columns, x.dtype, with_dv)
    row_blocks, key_blocks = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(pixels, tile["BLOCK_N"])
    cost = split_cost(pixels, key_width, key_width + (width if with_dv else 0))
    # Accumulators of up to 128 columns leave room for two programs on an SM, if shared memory does.
    two = tile["BLOCK_K"] <= 64 and columns.width <= (64 if with_dv else 192)
    split_blocks = key_blocks_of_split(row_blocks * columns.count, key_blocks, cost, 2 if two else 1)
    splits = triton.cdiv(key_blocks, split_blocks)
    dx = x.new_empty(columns.count * splits, batches, pixels, key_width, dtype=torch.float32)
    dv = x.new_empty(splits, batches, pixels, width, dtype=torch.float32) if with_dv else None
    affinity_gradient_kernel[batches * splits * row_blocks, columns.count](
        x, y, a, b, dx, dv, pixels, key_width, width, batches, splits, split_blocks,
        *x.stride(), *y.stride(), *a.stride(), *b.stride(), 0.5 * scale, columns.width,
        WITH_DV=with_dv, PRECISION=precision(x.dtype), **tile,
    )  # fmt: skip
    return dx, dv


def affinity_attention_backward(
    dintra: Tensor, dinter: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if not q.shape[0] * q.shape[1]:
        return dq, dk, dv
    factor = 1 / v.shape[1] if mean else 1.0
    key_width = key_columns("affinity_attention", q)
    columns = value_columns(v.shape[2], key_width, v.dtype)
    with torch.cuda.device_of(q):
        sums, e = column_sums(dintra, dinter, columns.total, copy=True)
        q, k, v = aligned(q, key_width), aligned(k, key_width), aligned(v, columns.total)
        parts, _ = gradients(q, k, e, v, columns, scale, with_dv=False)
        combine(parts, None, dq, None, 0.5 * scale * factor)
        parts, values = gradients(k, q, v, e, columns, scale, with_dv=True)
        combine(parts, None, dk, None, 0.5 * scale * factor)
        combine(values, sums, dv, None, factor)
    return dq, dk, dv


LIBRARY.impl("affinity_attention_backward.triton", affinity_attention_backward, "CompositeExplicitAutograd")
