"""Triton implementation of fastcss::cost_filter and pack_text.

There are 2·B·T·P·HW·D FLOP for T·P·D + B·HW·D elements to read: the products are the limit with 80 prompts per class,
the launches with one prompt. There are five launches, or six if the text is not packed:

1. 1 / ‖row‖ of the pixels (and of the text), so that no normalised copy is made; an NCHW view is read in place, and a
   tensor is copied only if it cannot be read 16 bytes at a time;
2. text · pixels in tiles of float32 accumulators, of which only the largest of each text row over CHUNK pixels leaves
   the registers: 1/64 of the map, in float32. All images are one row of columns, each rounded up to whole chunks, so
   that a tile may end one image and begin the next: 5 images of 576 pixels fill 23 tiles, not 25;
3. the largest of those over the chunks and over a class's prompts: score [B, T], in float32;
4. the k best, as in top_classes;
5. the same products for the kept rows, gathered by index, written as the maps.

A scale is positive, so max(a · scale) = max(a) · scale even with rounding, and an element's sum over D has the same
order in a tile of any size: the score is exactly the largest value that launch 5 writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_tiles import aligned, round_up
from .multi_lora import precision
from .multi_lora_device import INTERPRETING, dot, load_tile, store_tile, tile_of
from .top_classes import best_of_rows
from .tuned import tuned

CHUNK = tl.constexpr(64)
SMALLEST = tl.constexpr(1e-12)


@triton.jit
def nan_or_larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Return the maximum along an axis, with NaN above all; tl.max ignores NaN."""
    if INTERPRETING:  # it would call nan_or_larger once an element
        is_nan = tl.max((x != x).to(tl.int32), AXIS)
        return tl.where(is_nan != 0, float("nan"), tl.max(tl.where(x != x, float("-inf"), x), AXIS))
    return tl.reduce(x, AXIS, nan_or_larger)


@triton.jit
def inverse_length(squares):
    """Compute 1 / max(√squares, 1e-12); NaN stays."""
    length = tl.sqrt_rn(squares)
    return 1.0 / tl.where(length < SMALLEST, SMALLEST, length)


@triton.jit
def row_scale_kernel(
    x, scale, N, D, stride_b, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """scale [B, N] = 1 / max(‖x‖, 1e-12)."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        tile = load_tile(x + batch * stride_b, row, d, N, D, stride_n, stride_d, BLOCK_N, BLOCK_D).to(tl.float32)
        squares += tile * tile
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(scale + batch * N + rows, inverse_length(tl.sum(squares, 1)), mask=rows < N)


@triton.jit(do_not_specialize=["images"])
def largest_cost_kernel(
    text, image, image_scale, best,
    R, N, D, images, chunks, stride_tb, stride_tr, stride_td, stride_ib, stride_in, stride_id,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """best [B, chunks, R]: the largest text · pixel · image_scale of each text row over a chunk of an image's pixels.

    A batch of text meets ``images`` images side by side. WHOLE: every chunk is full.
    """
    batch, block_m, block_n = tile_of(tl.program_id(0), R, images * chunks * CHUNK, BLOCK_M, BLOCK_N)
    row = block_m * BLOCK_M
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = column % (chunks * CHUNK)
    picture = batch * images + column // (chunks * CHUNK)
    there = (column < images * chunks * CHUNK) & (pixel < N)
    text += tl.cast(batch, tl.int64) * stride_tb
    offset = picture.to(tl.int64) * stride_ib + pixel.to(tl.int64) * stride_in
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        text_tile = load_tile(text, row, k, R, D, stride_tr, stride_td, BLOCK_M, BLOCK_K)
        image_tile = tl.load(
            image + depth[:, None].to(tl.int64) * stride_id + offset[None, :],
            mask=(depth < D)[:, None] & there[None, :],
            other=0.0,
        )
        acc = dot(text_tile, image_tile, acc, PRECISION)
    acc *= tl.load(image_scale + picture * N + pixel, mask=there, other=0.0)[None, :]
    if not WHOLE:
        acc = tl.where(there[None, :], acc, float("-inf"))
    parts = largest(tl.reshape(acc, [BLOCK_M, BLOCK_N // CHUNK, CHUNK]), 2)
    part = block_n * (BLOCK_N // CHUNK) + tl.arange(0, BLOCK_N // CHUNK)
    rows = row + tl.arange(0, BLOCK_M)
    place = (tl.cast(batch, tl.int64) * images * chunks + part)[None, :] * R + rows[:, None]
    tl.store(best + place, parts, mask=(rows < R)[:, None] & (part < images * chunks)[None, :])


@triton.jit
def class_score_kernel(
    best, text_scale, score, T, P, chunks, stride_sb,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """score [B, T] from best [B, chunks, T · P]."""
    blocks = tl.cdiv(T, BLOCK_T)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    flat = tl.arange(0, BLOCK_T * BLOCK_P)
    classes = tl.program_id(0) % blocks * BLOCK_T + flat // BLOCK_P
    of_class = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for p in range(0, P, BLOCK_P):
        prompts = p + flat % BLOCK_P
        there = (classes < T) & (prompts < P)
        rows = classes * P + prompts
        of_row = tl.full([BLOCK_T * BLOCK_P], float("-inf"), tl.float32)
        for c in range(0, chunks, BLOCK_CHUNKS):
            chunk = c + tl.arange(0, BLOCK_CHUNKS)
            tile = tl.load(
                best + (batch * chunks + chunk)[:, None] * T * P + rows[None, :],
                mask=(chunk < chunks)[:, None] & there[None, :],
                other=float("-inf"),
            )
            of_row = nan_or_larger(of_row, largest(tile, 0))
        scaled = of_row * tl.load(text_scale + batch * stride_sb + rows, mask=there, other=1.0)
        of_class = nan_or_larger(of_class, largest(tl.reshape(scaled, [BLOCK_T, BLOCK_P]), 1))
    out = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    tl.store(score + batch * T + out, of_class, mask=out < T)


@triton.jit
def kept_cost_kernel(
    text, image, text_scale, image_scale, index, cost,
    T, P, k, N, D, stride_tb, stride_tr, stride_td, stride_sb, stride_ib, stride_in, stride_id,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """cost [B, k · P, N] of the classes index [B, k]."""
    batch, block_m, block_n = tile_of(tl.program_id(0), k * P, N, BLOCK_M, BLOCK_N)
    row, column = block_m * BLOCK_M, block_n * BLOCK_N
    batch64 = tl.cast(batch, tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    kept = tl.load(index + batch64 * k + rows // P, mask=rows < k * P, other=-1)
    known = (kept >= 0) & (kept < T)
    source = kept * P + rows % P
    text += batch64 * stride_tb + source * stride_tr
    image += batch64 * stride_ib
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_K):
        depth = d + tl.arange(0, BLOCK_K)
        text_tile = tl.load(
            text[:, None] + depth[None, :].to(tl.int64) * stride_td,
            mask=known[:, None] & (depth < D)[None, :],
            other=0.0,
        )
        image_tile = load_tile(image, d, column, D, N, stride_id, stride_in, BLOCK_K, BLOCK_N)
        acc = dot(text_tile, image_tile, acc, PRECISION)
    pixels = column + tl.arange(0, BLOCK_N)
    acc *= tl.load(image_scale + batch64 * N + pixels, mask=pixels < N, other=0.0)[None, :]
    acc *= tl.load(text_scale + batch64 * stride_sb + source, mask=known, other=0.0)[:, None]
    store_tile(cost + batch64 * k * P * N, acc, row, column, k * P, N, N)


@tuned("BLOCK_M", "BLOCK_N", "BLOCK_K")
def cost_tile(rows: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        m, n, k, warps, stages = 64, 64, 32, 8, 3
    elif rows <= 64:
        m, n, k, warps, stages = 64, 64, 64, 4, 4
    else:  # two programs on a multiprocessor: one multiplies while the other looks for its maxima
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def row_scale(x: Tensor) -> Tensor:
    """Compute 1 / the lengths of the rows of x [B, N, D], float32 [B, N]."""
    batch, rows, width = x.shape
    scale = x.new_empty(batch, rows, dtype=torch.float32)
    if scale.numel():
        row_scale_kernel[(batch * triton.cdiv(rows, 16),)](
            x, scale, rows, width, *x.stride(), BLOCK_N=16, BLOCK_D=min(max(triton.next_power_of_2(width), 16), 256)
        )
    return scale


def class_scores(text: Tensor, text_scale: Tensor, pixels: Tensor, pixel_scale: Tensor, prompts: int) -> Tensor:
    """text [1 or B, T · P, D], pixels [B, N, D] → score [B, T] in float32."""
    (batch, size, width), rows = pixels.shape, text.shape[1]
    images, chunks, classes = batch // len(text), triton.cdiv(size, CHUNK.value), rows // prompts
    best = pixels.new_empty(batch, chunks, rows, dtype=torch.float32)
    score = best.new_empty(batch, classes)
    tile = cost_tile(rows, pixels.dtype)
    columns = images * chunks * CHUNK.value
    largest_cost_kernel[(len(text) * triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]),)](
        text, pixels, pixel_scale, best, rows, size, width, images, chunks, *text.stride(), *pixels.stride(),
        WHOLE=size % CHUNK.value == 0, PRECISION=precision(pixels.dtype), **tile,
    )  # fmt: skip
    block_p = min(triton.next_power_of_2(prompts), 128)
    block_t = 128 // block_p
    class_score_kernel[(batch * triton.cdiv(classes, block_t),)](
        best, text_scale, score, classes, prompts, chunks, rows if len(text) > 1 else 0,
        BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_CHUNKS=16,
    )  # fmt: skip
    return score


def cost_filter(image: Tensor, text: Tensor, scale: Tensor, panels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    (batch, height, width, depth), (_, classes, prompts, _) = image.shape, text.shape
    cost = image.new_empty(batch, k, prompts, height, width)
    if not batch:
        return cost, image.new_empty((0, k), dtype=torch.int64), image.new_empty(0, k)
    columns = round_up(max(depth, 1), 16)
    with torch.cuda.device_of(image):
        pixels, text = aligned(image.flatten(1, 2), columns), aligned(text.flatten(1, 2), columns)
        pixel_scale = row_scale(pixels)
        text_scale = scale.contiguous() if scale.numel() else row_scale(text)
        score = class_scores(text, text_scale, pixels, pixel_scale, prompts)
        score, index = best_of_rows(score, k, image.dtype)
        tile = cost_tile(k * prompts, image.dtype)
        blocks = triton.cdiv(k * prompts, tile["BLOCK_M"]) * triton.cdiv(height * width, tile["BLOCK_N"])
        kept_cost_kernel[(batch * blocks,)](
            text, pixels, text_scale, pixel_scale, index, cost, classes, prompts, k, height * width, columns,
            text.stride(0) if len(text) > 1 else 0, *text.stride()[1:], classes * prompts if len(text) > 1 else 0,
            *pixels.stride(), PRECISION=precision(image.dtype), **tile,
        )  # fmt: skip
    return cost, index, score


def pack_text(text: Tensor, want_panels: bool) -> tuple[Tensor, Tensor]:
    if want_panels:
        raise ValueError("pack_text: impl='triton' reads the text as it is and makes no panels")
    with torch.cuda.device_of(text):
        return row_scale(text.flatten(1, 2)).view(text.shape[:3]), text.new_empty(0, dtype=torch.float32)


LIBRARY.impl("cost_filter.triton", cost_filter, "CompositeExplicitAutograd")
LIBRARY.impl("pack_text.triton", pack_text, "CompositeExplicitAutograd")
