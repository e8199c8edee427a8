"""Triton implementation of fastcss::class_affinity: softmax(M P) centers and softmax((1 − M) P) centers, P = feats Cᵀ.

intra Cᵀ = (M F) Cᵀ = M (F Cᵀ), so the N² work has C columns instead of D, and intra and inter [B, N, D] before the
classes never exist. There are three steps: the GEMM library makes P, in rows of a multiple of 16 columns; the kernel of
affinity_attention makes T P; and one kernel adds its parts, forms both logits ½ (ΣP ± T P), and attends to the centres.

That last kernel takes 32 pixels, whose two results are the 64 rows of one tensor-core tile, with all of D ≤ 512 in one
accumulator. The parts, 4·splits·N·C bytes, are read once, with a softmax that is rescaled as classes go by; 4096 pixels
are 128 programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_attention import attend, value_columns
from .affinity_device import column_total, exp2
from .affinity_tiles import MAX_CHUNKS, aligned, column_sums, key_columns
from .multi_lora import precision
from .multi_lora_device import dot, load_tile
from .tuned import tuned

PIXELS = tl.constexpr(32)
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["batches"])
def attend_classes_kernel(
    partial, sums, centers, intra, inter, tp,
    N, C, D, width, batches, chunks, stride_cb, stride_cc, stride_cd, log2_factor,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """intra and inter [B, N, D] from T P in parts [PARTS, B, N, width] and the sums of P; tp [B, N, C] is T P."""
    blocks = tl.cdiv(N, PIXELS)
    row = tl.program_id(0) % blocks * PIXELS
    batch = tl.program_id(0) // blocks
    column = tl.program_id(1) * BLOCK_D
    batch64 = tl.cast(batch, tl.int64)
    centers += batch64 * stride_cb
    # Every pixel has two rows: ½ (ΣP + T P) in the first half of the rows, ½ (ΣP − T P) in the second.
    rows = tl.arange(0, 2 * PIXELS)
    pixels = row + rows % PIXELS
    sign = tl.where(rows < PIXELS, 1.0, -1.0)
    largest = tl.full([2 * PIXELS], float("-inf"), tl.float32)
    mass = tl.zeros([2 * PIXELS], tl.float32)
    acc = tl.zeros([2 * PIXELS, BLOCK_D], tl.float32)
    for c in range(0, C, BLOCK_C):
        classes = c + tl.arange(0, BLOCK_C)
        there = (pixels < N)[:, None] & (classes < width)[None, :]
        offset = (batch64 * N + pixels)[:, None] * width + classes[None, :]
        t_p = tl.zeros([2 * PIXELS, BLOCK_C], tl.float32)
        for part in tl.static_range(PARTS):
            t_p += tl.load(partial + tl.cast(part, tl.int64) * batches * N * width + offset, mask=there, other=0.0)
        if tp is not None:
            kept = pixels < tl.where(tl.program_id(1) == 0, N, 0)
            first = ((rows < PIXELS) & kept)[:, None] & (classes < C)[None, :]
            tl.store(tp + (batch64 * N + pixels)[:, None] * C + classes[None, :], t_p, mask=first)
        total = column_total(sums, batch, c, batches, chunks, width, CHUNKS, BLOCK_C)
        logits = tl.where((classes < C)[None, :], (total[None, :] + sign[:, None] * t_p) * log2_factor, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shrink = exp2(largest - new_largest)
        weights = exp2(logits - new_largest[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        center_tile = load_tile(centers, c, column, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D)
        acc = dot(weights.to(center_tile.dtype), center_tile, acc * shrink[:, None], PRECISION)
        largest = new_largest
    acc = acc / mass[:, None]
    columns = column + tl.arange(0, BLOCK_D)
    offset = (batch64 * N + pixels)[:, None] * D + columns[None, :]
    there = (pixels < N)[:, None] & (columns < D)[None, :]
    result = acc.to(intra.dtype.element_ty)
    tl.store(intra + offset, result, mask=there & (rows < PIXELS)[:, None])
    tl.store(inter + offset, result, mask=there & (rows >= PIXELS)[:, None])


@tuned("BLOCK_C", "BLOCK_D")
def classes_tile(depth: int, dtype: torch.dtype) -> dict[str, int]:
    d = 64 if dtype == torch.float32 else min(max(triton.next_power_of_2(depth), 16), 512)
    return {"BLOCK_C": 32, "BLOCK_D": d, "num_warps": 8, "num_stages": 2}


def class_affinity(
    q: Tensor, k: Tensor, feats: Tensor, centers: Tensor, scale: float, mean: bool, save_tp: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batches, pixels, depth), classes = feats.shape, centers.shape[1]
    intra, inter = feats.new_empty(feats.shape), feats.new_empty(feats.shape)
    tp = feats.new_zeros((batches, pixels, classes) if save_tp and not intra.numel() else (0,), dtype=torch.float32)
    if not intra.numel():
        return intra, inter, tp
    if save_tp:
        tp = feats.new_empty(batches, pixels, classes, dtype=torch.float32)
    key_width = key_columns("class_affinity", q)
    columns = value_columns(classes, key_width, feats.dtype)
    factor = 0.5 / pixels if mean else 0.5
    with torch.cuda.device_of(q):
        scores = feats.new_empty(batches, pixels, columns.total)  # columns past the classes are never read
        torch.bmm(feats, centers.transpose(1, 2), out=scores[:, :, :classes])
        sums, _ = column_sums(scores, None, columns.total, copy=False)
        q, k = aligned(q, key_width), aligned(k, key_width)
        partial = attend(q, k, scores, sums, columns, scale, factor, None)
        tile = classes_tile(depth, feats.dtype)
        attend_classes_kernel[batches * triton.cdiv(pixels, PIXELS.value), triton.cdiv(depth, tile["BLOCK_D"])](
            partial, sums, centers, intra, inter, tp if save_tp else None,
            pixels, classes, depth, columns.total, batches, sums.shape[0], *centers.stride(), factor * LOG2_E,
            PARTS=partial.shape[0], CHUNKS=MAX_CHUNKS, PRECISION=precision(q.dtype), **tile,
        )  # fmt: skip
    return intra, inter, tp


LIBRARY.impl("class_affinity.triton", class_affinity, "CompositeExplicitAutograd")
