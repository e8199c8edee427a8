"""Triton implementation of fastcss::phrase_pool_backward.

Let w be the weights, c the cosines, dw_bcm = dpooled_bc · x_cm, dc = w (dw − Σ_m w dw), and ê and x̂ the unit rows:

    dx_cm = Σ_b w dpooled_bc + (Σ_b dc ê_b − x̂_cm Σ_b dc c) / ‖x_cm‖,   de_b = (Σ_cm dc x̂_cm − ê_b Σ_cm dc c) / ‖e_b‖

The phrases are read three times: for c and dw, by the program that owns their gradient, and for de, whose sums over all
phrases are split among programs and added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_tiles import combine
from .cost_filter import SMALLEST
from .multi_lora_device import dot, load_tile, store_tile
from .phrase_pool import IMAGES, cosines_of, exp, load_weights, load_wide, phrase_block, product_precision

ROWS = 32  # a program takes this many phrases at a time for the gradient of cls
MAX_SPLITS = 16


@triton.jit
def projected(products, unit, along, scale):
    """Compute (products − unit · along) · scale. A row whose length was replaced by 1e-12 is divided by a constant."""
    along = tl.where(scale < 1.0 / SMALLEST, along, 0.0)
    return (products - unit * along[:, None]) * scale[:, None]


@triton.jit(do_not_specialize=["B"])
def phrases_gradient_kernel(
    dpooled, cls, phrases, cosine, mass, cls_scale, phrase_scale, dweight, dmean, dphrases, B, C, M, D,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    which, m = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    which64 = tl.cast(which, tl.int64)
    column = tl.program_id(1) * BLOCK_D
    pooled = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    turned = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    for image in range(0, B, IMAGES):
        images = image + tl.arange(0, IMAGES)
        weights, cosines = load_weights(cosine, mass, image, which, m, B, C, M, BLOCK_M)
        mean = tl.load(dmean + images * C + which, mask=images < B, other=0.0)
        dweights = load_tile(dweight + which64 * M, image, m, B, M, C * M, 1, IMAGES, BLOCK_M)
        dcosines = weights * (dweights - mean[:, None])
        along += tl.sum(dcosines * cosines, 0)
        gradient = load_wide(dpooled + which64 * D, image, column, B, D, C * D, 1, IMAGES, BLOCK_D)
        inverse = tl.load(cls_scale + images, mask=images < B, other=0.0)
        unit = load_wide(cls, image, column, B, D, D, 1, IMAGES, BLOCK_D) * inverse[:, None]
        pooled = dot(tl.trans(weights), gradient, pooled, PRECISION)
        turned = dot(tl.trans(dcosines), unit, turned, PRECISION)
    prompts = m + tl.arange(0, BLOCK_M)
    scale = tl.load(phrase_scale + which64 * M + prompts, mask=prompts < M, other=0.0)
    words = load_wide(phrases + which64 * M * D, m, column, M, D, D, 1, BLOCK_M, BLOCK_D) * scale[:, None]
    store_tile(dphrases + which64 * M * D, pooled + projected(turned, words, along, scale), m, column, M, D, D)


@triton.jit(do_not_specialize=["B"])
def cls_gradient_kernel(
    cls, phrases, cosine, mass, cls_scale, phrase_scale, dweight, dmean, partial, B, C, M, D, per_split,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial [splits, B, D]: the gradient of cls through ``per_split`` of the C · M phrases."""
    image, column = tl.program_id(0) * IMAGES, tl.program_id(1) * BLOCK_D
    images = image + tl.arange(0, IMAGES)
    first = tl.program_id(2) * per_split
    last = min(first + per_split, C * M)
    acc = tl.zeros([IMAGES, BLOCK_D], tl.float32)
    along = tl.zeros([IMAGES], tl.float32)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        there = (images < B)[:, None] & (rows < last)[None, :]
        place = images[:, None] * C + (rows // M)[None, :]
        cosines = load_tile(cosine, image, row, B, last, C * M, 1, IMAGES, ROWS)
        dweights = load_tile(dweight, image, row, B, last, C * M, 1, IMAGES, ROWS)
        weights = exp(cosines) / tl.load(mass + place, mask=there, other=1.0)
        dcosines = tl.where(there, weights * (dweights - tl.load(dmean + place, mask=there, other=0.0)), 0.0)
        along += tl.sum(dcosines * cosines, 1)
        scale = tl.load(phrase_scale + rows, mask=rows < last, other=0.0)
        words = load_wide(phrases, row, column, last, D, D, 1, ROWS, BLOCK_D) * scale[:, None]
        acc = dot(dcosines, words, acc, PRECISION)
    inverse = tl.load(cls_scale + images, mask=images < B, other=0.0)
    unit = load_wide(cls, image, column, B, D, D, 1, IMAGES, BLOCK_D) * inverse[:, None]
    result = projected(acc, unit, along, inverse)
    store_tile(partial + tl.cast(tl.program_id(2), tl.int64) * B * D, result, image, column, B, D, D)


def phrase_pool_backward(dpooled: Tensor, cls: Tensor, phrases: Tensor) -> tuple[Tensor, Tensor]:
    batch, (classes, count, depth) = len(cls), phrases.shape
    dcls, dphrases = cls.new_empty(cls.shape), phrases.new_empty(phrases.shape)
    if not dcls.numel():
        return dcls, dphrases.zero_()
    dpooled, cls, phrases = dpooled.contiguous(), cls.contiguous(), phrases.contiguous()
    sizes, kind = (batch, classes, count, depth), product_precision(cls.dtype)
    block_m, columns = phrase_block(count), triton.cdiv(depth, 64)
    per_split = triton.cdiv(triton.cdiv(classes * count, ROWS), MAX_SPLITS) * ROWS
    splits = triton.cdiv(classes * count, per_split)
    with torch.cuda.device_of(cls):
        found = cosines_of(cls, phrases, dpooled)
        phrases_gradient_kernel[classes * triton.cdiv(count, block_m), columns](
            dpooled, cls, phrases, *found, dphrases, *sizes, PRECISION=kind, BLOCK_M=block_m, BLOCK_D=64, num_warps=4
        )
        partial = cls.new_empty(splits, 1, batch, depth, dtype=torch.float32)
        cls_gradient_kernel[triton.cdiv(batch, IMAGES.value), columns, splits](
            cls, phrases, *found, partial, *sizes, per_split, PRECISION=kind, ROWS=ROWS, BLOCK_D=64, num_warps=4
        )
        combine(partial, None, dcls[None], None, 1.0)
    return dcls, dphrases


LIBRARY.impl("phrase_pool_backward.triton", phrase_pool_backward, "CompositeExplicitAutograd")
