"""Triton implementation of fastcss::affinity_loss and its backward: the mean of softplus(±s) over all pairs of pixels.

A pair of the same label costs softplus(−s), any other pair softplus(s), s = scale · q_i · k_j. In base 2, t = ±s log2
e:

    softplus(±s) = ln 2 · (max(t, 0) + log2(1 + 2^−|t|)),   Σ log2(1 + 2^−|t|) = log2 Π (1 + 2^−|t|)

A factor is at most 2, so a thread multiplies up to 64 of them, one from each key block, before one logarithm. That is
one special-function op per pair instead of two, and that unit is the limit (1/16 of an SM's clock per pair, against
1/32 for the products at K = 64). The product less 1 is kept: it is Σ 2^−|t| if all pairs are told apart well, and would
be lost beside 1. Ignored pairs have t = −∞ and cost exactly 0.

Backward, ds = ±sigmoid(±s). One kernel makes dq from it over query blocks and, with q and k swapped, dk over key
blocks, without atomics. Its sigmoid is 1/(1 + 2^−t), two special-function ops. tanh would be one, but with an absolute
error of 2⁻¹², which is as large as the gradient of a pair that is already told apart, and most pairs are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_device import exp2, reciprocal
from .affinity_tiles import aligned, combine, key_blocks_of_split, key_columns, split_cost
from .multi_lora import precision
from .multi_lora_device import dot, load_tile, store_tile
from .tuned import tuned

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_FACTORS = 64  # factors of at most 2 in one float32 product, which could hold 2¹²⁷


@triton.jit
def _signed_scores(
    x_tile, x_labels, y, labels, n, last, K, stride_yn, stride_yk, scale, ignore_index,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(t, agreement, y): t = −s if the labels agree, else s; −∞ if the column is ignored or not there."""
    columns = n + tl.arange(0, BLOCK_N)
    y_labels = tl.load(labels + columns, mask=columns < last, other=ignore_index)
    y_tile = load_tile(y + tl.cast(n, tl.int64) * stride_yn, 0, 0, last - n, K, stride_yn, stride_yk, BLOCK_N, BLOCK_K)
    s = dot(x_tile, tl.trans(y_tile), tl.zeros([x_tile.shape[0], BLOCK_N], tl.float32), PRECISION)
    same = x_labels[:, None] == y_labels[None, :]
    t = tl.where((y_labels != ignore_index)[None, :], s * tl.where(same, -scale, scale), float("-inf"))
    return t, same, y_tile


@triton.jit
def log2_1p(x):
    """Compute log2(1 + x), x ≥ 0: the rounding of u = 1 + x is in u − 1 too, and cancels."""
    u = 1.0 + x
    return tl.where(u == 1.0, x * LOG2_E, tl.log2(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def affinity_loss_kernel(
    q, k, labels, partial,
    N, K, splits, split_blocks, stride_qb, stride_qn, stride_qk, stride_kb, stride_kn, stride_kk, scale, ignore_index,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write one sum per program: its rows against its split of the keys."""
    blocks = tl.cdiv(N, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks % splits
    batch = tl.cast(tl.program_id(0) // (blocks * splits), tl.int64)
    q += batch * stride_qb
    k += batch * stride_kb
    labels += batch * N
    rows = row + tl.arange(0, BLOCK_M)
    q_labels = tl.load(labels + rows, mask=rows < N, other=ignore_index)
    q_tile = load_tile(q, row, 0, N, K, stride_qn, stride_qk, BLOCK_M, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    excess = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # Π (1 + 2^−|t|) − 1
    first = split * split_blocks * BLOCK_N
    last = min(first + split_blocks * BLOCK_N, N)
    for n in range(first, last, BLOCK_N):
        t, _, _ = _signed_scores(
            q_tile, q_labels, k, labels, n, last, K, stride_kn, stride_kk, scale, ignore_index,
            PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total += tl.maximum(t, 0.0)  # 0 for NaN, which the product keeps
        e = exp2(-tl.abs(t))
        excess += excess * e + e
    total += log2_1p(excess)
    loss = tl.sum(tl.where((q_labels != ignore_index)[:, None], total, 0.0)) * LN_2
    tl.store(partial + tl.program_id(0), loss)


@triton.jit(do_not_specialize=["B", "count"])
def mean_over_pairs_kernel(values, labels, out, count, B, N, ignore_index, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """out = Σ values / Σ_b n_b², n_b the pixels of image b that are not ignored; 0 without any. One program.

    ``values`` are [B, count], or one number if ``ONE``. Each image is summed by itself: the same bits in any batch.
    """
    offsets = tl.arange(0, BLOCK)
    pairs = 0.0
    total = tl.load(values) if ONE else 0.0
    for b in range(B):
        counted = tl.zeros([BLOCK], tl.int32)
        for n in range(0, N, BLOCK):
            label = tl.load(labels + tl.cast(b, tl.int64) * N + n + offsets, mask=n + offsets < N, other=ignore_index)
            counted += (label != ignore_index).to(tl.int32)
        pixels = tl.sum(counted).to(tl.float32)
        pairs += pixels * pixels
        if not ONE:
            of_image = tl.zeros([BLOCK], tl.float32)
            for i in range(0, count, BLOCK):
                place = tl.cast(b, tl.int64) * count + i + offsets
                of_image += tl.load(values + place, mask=i + offsets < count, other=0.0)
            total += tl.sum(of_image)
    tl.store(out, tl.where(pairs > 0, total / tl.maximum(pairs, 1.0), 0.0))


@triton.jit(do_not_specialize=["batches"])
def affinity_loss_gradient_kernel(
    x, y, labels, dx,
    N, K, batches, splits, split_blocks,
    stride_xb, stride_xn, stride_xk, stride_yb, stride_yn, stride_yk, scale, ignore_index,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [splits, B, N, K] = Σ_j ±sigmoid(±s_ij) y_j over the split's keys."""
    blocks = tl.cdiv(N, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks % splits
    batch = tl.cast(tl.program_id(0) // (blocks * splits), tl.int64)
    x += batch * stride_xb
    y += batch * stride_yb
    labels += batch * N
    rows = row + tl.arange(0, BLOCK_M)
    x_labels = tl.load(labels + rows, mask=rows < N, other=ignore_index)
    x_tile = load_tile(x, row, 0, N, K, stride_xn, stride_xk, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first = split * split_blocks * BLOCK_N
    last = min(first + split_blocks * BLOCK_N, N)
    for n in range(first, last, BLOCK_N):
        t, same, y_tile = _signed_scores(
            x_tile, x_labels, y, labels, n, last, K, stride_yn, stride_yk, scale, ignore_index,
            PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        ds = reciprocal(1.0 + exp2(-t))
        acc = dot(tl.where(same, -ds, ds).to(y_tile.dtype), y_tile, acc, PRECISION)
    acc = tl.where((x_labels != ignore_index)[:, None], acc, 0.0)
    store_tile(dx + (tl.cast(split, tl.int64) * batches + batch) * N * K, acc, row, 0, N, K, K)


@tuned("BLOCK_M", "BLOCK_N")
def loss_tile(key_width: int, dtype: torch.dtype, accumulates_keys: bool) -> dict[str, int]:
    block_k = triton.next_power_of_2(key_width)
    if dtype == torch.float32:
        m, n, warps, stages = (64, 32, 8, 2) if block_k <= 64 else (32, 32, 8, 1)
    elif block_k > 64:
        m, n, warps, stages = 128 if not accumulates_keys else 64, 32, 8, 2
    else:
        m, n, warps, stages = 128, 32, 8, 3
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def mean_over_pairs(values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Compute the scalar Σ values / pairs, for values [B, any] or one."""
    out = values.new_empty((), dtype=torch.float32)
    mean_over_pairs_kernel[(1,)](
        values, labels, out, values.numel() // labels.shape[0], *labels.shape, ignore_index,
        ONE=values.dim() == 0, BLOCK=2048, num_warps=16,
    )  # fmt: skip
    return out


def affinity_loss(q: Tensor, k: Tensor, labels: Tensor, scale: float, ignore_index: int) -> Tensor:
    if not q.shape[0] * q.shape[1]:
        return q.new_zeros((), dtype=torch.float32)
    (batches, pixels, _), key_width = q.shape, key_columns("affinity_loss", q)
    tile = loss_tile(key_width, q.dtype, accumulates_keys=False)
    row_blocks, key_blocks = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(pixels, tile["BLOCK_N"])
    split_blocks = min(key_blocks_of_split(row_blocks, key_blocks, 0.01, 2), MAX_FACTORS)
    splits = triton.cdiv(key_blocks, split_blocks)
    with torch.cuda.device_of(q):
        q, k, labels = aligned(q, key_width), aligned(k, key_width), labels.contiguous()
        partial = q.new_empty(batches, splits * row_blocks, dtype=torch.float32)
        affinity_loss_kernel[(partial.numel(),)](
            q, k, labels, partial, pixels, key_width, splits, split_blocks, *q.stride(), *k.stride(),
            scale * LOG2_E.value, ignore_index, PRECISION=precision(q.dtype), **tile,
        )  # fmt: skip
        return mean_over_pairs(partial, labels, ignore_index)


def affinity_loss_backward(
    dloss: Tensor, q: Tensor, k: Tensor, labels: Tensor, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    if not dq.numel():
        return dq, dk
    (batches, pixels, _), key_width = q.shape, key_columns("affinity_loss", q)
    tile = loss_tile(key_width, q.dtype, accumulates_keys=True)
    row_blocks, key_blocks = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(pixels, tile["BLOCK_N"])
    split_blocks = key_blocks_of_split(row_blocks, key_blocks, split_cost(pixels, key_width, key_width), 2)
    splits = triton.cdiv(key_blocks, split_blocks)
    with torch.cuda.device_of(q):
        q, k, labels = aligned(q, key_width), aligned(k, key_width), labels.contiguous()
        factor = mean_over_pairs(dloss, labels, ignore_index)
        parts = q.new_empty(splits, batches, pixels, key_width, dtype=torch.float32)
        for x, y, dx in ((q, k, dq), (k, q, dk)):
            affinity_loss_gradient_kernel[(batches * splits * row_blocks,)](
                x, y, labels, parts, pixels, key_width, batches, splits, split_blocks, *x.stride(), *y.stride(),
                scale * LOG2_E.value, ignore_index, PRECISION=precision(q.dtype), **tile,
            )  # fmt: skip
            combine(parts, None, dx, None, scale, factor)
    return dq, dk


LIBRARY.impl("affinity_loss.triton", affinity_loss, "CompositeExplicitAutograd")
LIBRARY.impl("affinity_loss_backward.triton", affinity_loss_backward, "CompositeExplicitAutograd")
