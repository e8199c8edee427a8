"""Triton implementation of fastcss::cost_filter_backward.

Let ê and t̂ be the normalised rows, G the gradient of an image's kept maps, [k·P, HW], and M the maps themselves:

    de_n = (Σ_r G_rn t̂_r − ê_n Σ_r G_rn M_rn) / ‖e_n‖,   dt_r = (Σ_n G_rn ê_n − t̂_r Σ_n G_rn M_rn) / ‖t_r‖

That is 4·B·k·P·HW·D FLOP. One kernel computes both, with G as it is or transposed. It finds the projection during the
product, so G and M are read once for every column block. ê and t̂ are written before, rounded as eager code rounds
them, so that the products read operands that are ready. dt_r of each image, in float32, is added up by class over the
images in their order; it is 0 for a class that no image kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_tiles import round_up
from .cost_filter import SMALLEST, inverse_length
from .multi_lora import precision
from .multi_lora_device import dot, load_tile, store_tile, tile_of
from .tuned import tuned


@triton.jit
def unit_rows_kernel(
    x, index, unit, scale,
    N, T, P, k, D, width, stride_b, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write unit [B, N, width], rows of x ÷ their lengths with zeros beyond D, and scale [B, N], 1 ÷ the lengths.

    The rows are those of x [B, N, D]; or, with an index [B, k], the N = k · P rows of the named classes in
    x [B, T · P, D].
    """
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    rows = row + tl.arange(0, BLOCK_N)
    there = rows < N
    source = rows.to(tl.int64)
    if index is not None:
        kept = tl.load(index + batch * k + rows // P, mask=there, other=-1)
        there &= (kept >= 0) & (kept < T)
        source = kept * P + rows % P
    x += batch * stride_b + source * stride_n
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (depth < D)[None, :]
        tile = tl.load(x[:, None] + depth[None, :].to(tl.int64) * stride_d, mask=mask, other=0.0).to(tl.float32)
        squares += tile * tile
    inverse = inverse_length(tl.sum(squares, 1))
    tl.store(scale + batch * N + rows, inverse, mask=rows < N)
    for d in range(0, width, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (depth < D)[None, :]
        tile = tl.load(x[:, None] + depth[None, :].to(tl.int64) * stride_d, mask=mask, other=0.0).to(tl.float32)
        store_tile(unit + batch * N * width, tile * inverse[:, None], row, d, N, width, width)


@triton.jit
def cosine_gradient_kernel(
    dcost, cost, own, other, scale, gradient,
    M, N, D, width, stride_gb, stride_gm, stride_gn, stride_cm, stride_cn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gradient [B, M, D] = scale_m (Σ_n G_mn other_n − own_m Σ_n G_mn cost_mn), G = dcost, for a contiguous cost."""
    batch, block_m, block_d = tile_of(tl.program_id(0), M, D, BLOCK_M, BLOCK_D)
    row, column = block_m * BLOCK_M, block_d * BLOCK_D
    batch64 = tl.cast(batch, tl.int64)
    dcost += batch64 * stride_gb
    cost += batch64 * M * N
    own += batch64 * M * width
    other += batch64 * N * width
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in range(0, N, BLOCK_N):
        g = load_tile(dcost, row, n, M, N, stride_gm, stride_gn, BLOCK_M, BLOCK_N)
        along += g.to(tl.float32) * load_tile(cost, row, n, M, N, stride_cm, stride_cn, BLOCK_M, BLOCK_N).to(tl.float32)
        acc = dot(g, load_tile(other, n, column, N, width, width, 1, BLOCK_N, BLOCK_D), acc, PRECISION)
    rows = row + tl.arange(0, BLOCK_M)
    inverse = tl.load(scale + batch64 * M + rows, mask=rows < M, other=0.0)
    # A row whose length was replaced by 1e-12 is divided by a constant: it has no projection.
    projection = tl.where(inverse < 1.0 / SMALLEST, tl.sum(along, 1), 0.0)
    acc -= load_tile(own, row, column, M, width, width, 1, BLOCK_M, BLOCK_D).to(tl.float32) * projection[:, None]
    store_tile(gradient + batch64 * M * D, acc * inverse[:, None], row, column, M, D, D)


@triton.jit(do_not_specialize=["images"])
def text_gradient_kernel(
    rows, index, dtext, images, T, k, size, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dtext [1 or B, T, size]: the sum over ``images`` of the rows [B, k, size] of a class."""
    blocks = tl.cdiv(size, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(0) // blocks % T
    batch = tl.program_id(0) // blocks // T
    places = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK], tl.float32)
    for image in range(batch * images, batch * images + images):
        image64 = tl.cast(image, tl.int64)
        kept = tl.load(index + image64 * k + places, mask=places < k, other=-1)
        place = tl.max(tl.where(kept == which, places, -1), 0)
        total += tl.load(
            rows + (image64 * k + place) * size + column, mask=column < tl.where(place >= 0, size, 0), other=0.0
        )
    out = dtext + (tl.cast(batch, tl.int64) * T + which) * size + column
    tl.store(out, total.to(dtext.dtype.element_ty), mask=column < size)


@tuned("BLOCK_M", "BLOCK_N", "BLOCK_D")
def gradient_tile(rows: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        m, n, d, warps, stages = 64, 32, 64, 8, 2
    elif rows <= 64:
        m, n, d, warps, stages = 64, 32, 64, 4, 4
    else:
        m, n, d, warps, stages = 128, 64, 128, 8, 3
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def unit_rows(x: Tensor, index: Tensor | None, rows: int, classes: int, prompts: int) -> tuple[Tensor, Tensor]:
    """See unit_rows_kernel; x [1 or B, …, D] is shared by the batch that ``index`` has."""
    batch, depth = len(x) if index is None else len(index), x.shape[2]
    width = round_up(max(depth, 1), 16)
    unit = x.new_empty(batch, rows, width)
    scale = x.new_empty(batch, rows, dtype=torch.float32)
    unit_rows_kernel[(batch * triton.cdiv(rows, 16),)](
        x, index, unit, scale, rows, classes, prompts, 1 if index is None else index.shape[1], depth, width,
        x.stride(0) if len(x) > 1 else 0, *x.stride()[1:],
        BLOCK_N=16, BLOCK_D=min(triton.next_power_of_2(width), 256),
    )  # fmt: skip
    return unit, scale


def cosine_gradient(dcost: Tensor, cost: Tensor, own: Tensor, other: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """See cosine_gradient_kernel; dcost and cost [B, M, N]."""
    batch, rows, depth = gradient.shape
    tile = gradient_tile(rows, own.dtype)
    cosine_gradient_kernel[(batch * triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(depth, tile["BLOCK_D"]),)](
        dcost, cost, own, other, scale, gradient, rows, dcost.shape[2], depth, own.shape[2],
        *dcost.stride(), *cost.stride()[1:], PRECISION=precision(own.dtype), **tile,
    )  # fmt: skip


def cost_filter_backward(
    dcost: Tensor, image: Tensor, text: Tensor, cost: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    (batch, kept), (_, classes, prompts, depth) = index.shape, text.shape
    dimage, dtext = image.new_empty(image.shape), text.new_empty(text.shape)
    if not batch or not depth:
        return dimage, dtext.zero_()
    dcost, cost, index = dcost.reshape(batch, kept * prompts, -1), cost.contiguous(), index.contiguous()
    cost = cost.view(dcost.shape)
    with torch.cuda.device_of(image):
        pixels, pixel_scale = unit_rows(image.flatten(1, 2), None, dcost.shape[2], 1, 1)
        words, word_scale = unit_rows(text.flatten(1, 2), index, kept * prompts, classes, prompts)
        cosine_gradient(dcost.mT, cost.mT, pixels, words, pixel_scale, dimage.view(batch, -1, depth))
        rows = text.new_empty(batch, kept * prompts, depth, dtype=torch.float32)
        cosine_gradient(dcost, cost, words, pixels, word_scale, rows)
        size = prompts * depth
        text_gradient_kernel[(len(text) * classes * triton.cdiv(size, 1024),)](
            rows, index, dtext, batch // len(text), classes, kept, size,
            BLOCK_K=triton.next_power_of_2(kept), BLOCK=min(triton.next_power_of_2(size), 1024),
        )  # fmt: skip
    return dimage, dtext


LIBRARY.impl("cost_filter_backward.triton", cost_filter_backward, "CompositeExplicitAutograd")
