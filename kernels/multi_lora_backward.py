"""Triton implementation of fastcss::multi_lora_backward.

Let g_s = scale_t · dy_s B_t, the shrink of dy by the other side of the adapters:

    dx_s = dy_s W + g_s A_t, or dx = (Σ_s dy_s) W + Σ_s g_s A_t for a shared x
    dA_t = Σ_s g_sᵀ x_s, dB_t = Σ_s h_sᵀ dy_s over the slots s of adapter t

The forward kernel computes dx, with Wᵀ and the sides swapped. dA and dB read x and dy once and are bound by that; they
are split over chunks of rows to fill the GPU, and the chunks are added in a fixed order, so nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .multi_lora import Adapters, expand, linear, precision, rank_block, shrink, slot_strides
from .multi_lora_device import dot, load_tile, store_tile
from .tuned import tuned

# One program reduces this many rows of one slot. It is fixed, so that a gradient does not depend on how many adapters
# there are.
CHUNK = 512


@triton.jit
def _add_outer(
    acc, h, v, first, last, first_rank, column, rank, C, stride_hm, stride_vm, stride_vc,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute acc + vᵀ h over the rows first..last."""
    for m in range(first, last, BLOCK_M):
        v_tile = load_tile(v, column, m, C, last, stride_vc, stride_vm, BLOCK_C, BLOCK_M)
        h_tile = load_tile(h, m, first_rank, last, rank, stride_hm, 1, BLOCK_M, BLOCK_R).to(v_tile.dtype)
        acc = dot(v_tile, h_tile, acc, PRECISION)
    return acc


@triton.jit
def gradient_kernel(
    h, v, out, offsets, index,
    M, C, slots, chunks, num_rows, stride_hs, stride_hm, stride_vs, stride_vm, stride_vc,
    STACKED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[chunk, rows of adapter t] = Σ over the slots of t of h_sᵀ v_s; STACKED: all of h is one adapter's."""
    blocks = tl.cdiv(C, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C
    chunk = tl.program_id(0) // blocks % chunks
    adapter = tl.program_id(0) // blocks // chunks
    first_rank = tl.program_id(1) * BLOCK_R
    if STACKED:
        start, rank = 0, num_rows
    else:
        start = tl.load(offsets + adapter)
        rank = tl.load(offsets + adapter + 1) - start
    first = chunk * CHUNK
    last = tl.where(first_rank < rank, min(first + CHUNK, M), first)
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    if index is None:
        acc = _add_outer(
            acc, h + start, v + tl.cast(adapter, tl.int64) * stride_vs, first, last, first_rank, column, rank, C,
            stride_hm, stride_vm, stride_vc, PRECISION, BLOCK_C, BLOCK_R, BLOCK_M,
        )  # fmt: skip
    else:
        for s in range(slots):
            if tl.load(index + s) == adapter:
                h_slot, v_slot = h + tl.cast(s, tl.int64) * stride_hs, v + tl.cast(s, tl.int64) * stride_vs
                acc = _add_outer(
                    acc, h_slot, v_slot, first, last, first_rank, column, rank, C,
                    stride_hm, stride_vm, stride_vc, PRECISION, BLOCK_C, BLOCK_R, BLOCK_M,
                )  # fmt: skip
    out += (tl.cast(chunk, tl.int64) * num_rows + start) * C
    store_tile(out, tl.trans(acc), first_rank, column, rank, C, C)


@tuned("BLOCK_C", "BLOCK_M")
def gradient_tile(ranks: int, dtype: torch.dtype) -> dict[str, int]:
    c, m = (64, 32) if dtype == torch.float32 else (128, 64)
    return {"BLOCK_C": c, "BLOCK_R": rank_block(ranks, 64), "BLOCK_M": m, "num_warps": 8, "num_stages": 3}


def gradient(h: Tensor, v: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """[Σr, C]: Σ over an adapter's slots of h_sᵀ v_s, for ``v`` [M, C] or [S, M, C]."""
    (rows, width), total = v.shape[-2:], adapters.down.shape[0]
    stacked = v.dim() == 2 and adapters.index is None
    chunks = max(triton.cdiv(rows, CHUNK), 1)
    out = v.new_empty(chunks, total, width, dtype=dtype if chunks == 1 else torch.float32)
    ranks = total if stacked else adapters.max_rank
    tile = gradient_tile(ranks, v.dtype)
    if out.numel():
        programs = (1 if stacked else adapters.count) * chunks * triton.cdiv(width, tile["BLOCK_C"])
        gradient_kernel[programs, triton.cdiv(ranks, tile["BLOCK_R"])](
            h, v, out, adapters.offsets, adapters.index,
            rows, width, adapters.slots, chunks, total, *adapters.hidden_strides(rows), *slot_strides(v),
            STACKED=stacked, CHUNK=CHUNK, PRECISION=precision(v.dtype), **tile,
        )  # fmt: skip
    return out[0] if chunks == 1 else out.sum(0).to(dtype)


def multi_lora_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scales: Tensor,
    index: Tensor | None,
    h: Tensor,
    max_rank: int,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = Adapters.of(lora_a, lora_b, offsets, scales, index, max_rank)
    turned = forward._replace(down=forward.up, up=forward.down)
    dx, da, db, g = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0), None
    with torch.cuda.device_of(x):
        if need_dx and x.dim() == 3:
            dx, g = linear(dy, weight.t(), None, turned, x.dtype if need_dlora else None)
        if g is None and (need_dx or need_dlora):
            g = shrink(dy, turned, x.dtype)
        if need_dx and x.dim() == 2:
            dx = expand(dy.sum(0), weight.t(), None, g, turned, "sum")
        if need_dlora:
            if not h.numel():
                h = shrink(x, forward, x.dtype)
            da = gradient(g, x, forward, lora_a.dtype)
            db = gradient(h, dy, forward, lora_b.dtype)
    return dx, da, db


LIBRARY.impl("multi_lora_backward.triton", multi_lora_backward, "CompositeExplicitAutograd")
