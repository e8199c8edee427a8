"""Triton implementation of fastcss::phrase_pool.

There are 4·B·C·M·D FLOP for C·M·D elements of phrases. A batch of a few images is no work for a GPU, so the limit is to
read the phrases (1 µs for 150 classes of 31 × 512 in 16 bits) and to launch. There are two launches: a program of the
first computes the cosines of a class with 16 images, as products; one of the second the weighted sums of a block of
columns. No [B, C, M, D] is made; [B, C, M] is. |cos| ≤ 1, so the softmax needs no maximum.

Operands are float32, which tensor cores read as tf32: 16-bit inputs are exact in that, and weights lose 2⁻¹¹.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import exp
from .cost_filter import inverse_length
from .multi_lora import precision
from .multi_lora_device import dot, load_tile, store_tile

IMAGES = tl.constexpr(16)


class Cosines(NamedTuple):
    """Holds what the weights are made of, float32."""

    cosine: Tensor  # [B, C, M]
    mass: Tensor  # [B, C] = Σ_m exp cosine
    cls_scale: Tensor  # [B], one over the lengths
    phrase_scale: Tensor  # [C, M]
    dweight: Tensor | None  # [B, C, M], gradient of the weights
    dmean: Tensor | None  # [B, C], its mean over the weights


@triton.jit
def load_wide(base, row, column, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Call load_tile and convert to float32."""
    return load_tile(base, row, column, rows, columns, stride_row, stride_column, ROWS, COLUMNS).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def phrase_cosine_kernel(
    cls, phrases, dpooled, cosine, mass, cls_scale, phrase_scale, dweight, dmean, B, C, M, D,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the fields of Cosines; the gradients only if ``dpooled`` [B, C, D] is given."""
    which, image = tl.program_id(0) % C, tl.program_id(0) // C * IMAGES
    which64 = tl.cast(which, tl.int64)
    phrases += which64 * M * D
    images = image + tl.arange(0, IMAGES)
    total = tl.zeros([IMAGES], tl.float32)
    dtotal = tl.zeros([IMAGES], tl.float32)
    for m in range(0, M, BLOCK_M):
        acc = tl.zeros([IMAGES, BLOCK_M], tl.float32)
        dacc = tl.zeros([IMAGES, BLOCK_M], tl.float32)
        cls_squares = tl.zeros([IMAGES, BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        for d in range(0, D, BLOCK_D):
            words = load_wide(phrases, d, m, D, M, 1, D, BLOCK_D, BLOCK_M)
            tokens = load_wide(cls, image, d, B, D, D, 1, IMAGES, BLOCK_D)
            acc = dot(tokens, words, acc, PRECISION)
            squares += words * words
            cls_squares += tokens * tokens
            if dpooled is not None:
                gradient = load_wide(dpooled + which64 * D, image, d, B, D, C * D, 1, IMAGES, BLOCK_D)
                dacc = dot(gradient, words, dacc, PRECISION)
        inverse = inverse_length(tl.sum(squares, 0))
        cls_inverse = inverse_length(tl.sum(cls_squares, 1))
        cosines = acc * cls_inverse[:, None] * inverse[None, :]
        prompts = m + tl.arange(0, BLOCK_M)
        weights = tl.where((prompts < M)[None, :], exp(cosines), 0.0)
        total += tl.sum(weights, 1)
        store_tile(cosine + which64 * M, cosines, image, m, B, M, C * M)
        if dpooled is not None:
            dtotal += tl.sum(weights * dacc, 1)
            store_tile(dweight + which64 * M, dacc, image, m, B, M, C * M)
        tl.store(phrase_scale + which64 * M + prompts, inverse, mask=prompts < tl.where(image == 0, M, 0))
        tl.store(cls_scale + images, cls_inverse, mask=images < tl.where((which == 0) & (m == 0), B, 0))
    tl.store(mass + images * C + which, total, mask=images < B)
    if dpooled is not None:
        tl.store(dmean + images * C + which, dtotal / total, mask=images < B)


@triton.jit
def load_weights(cosine, mass, image, which, m, B, C, M, BLOCK_M: tl.constexpr):
    """Load (weights, cosines) [IMAGES, BLOCK_M], 0 outside."""
    images = image + tl.arange(0, IMAGES)
    prompts = m + tl.arange(0, BLOCK_M)
    cosines = load_tile(cosine + tl.cast(which, tl.int64) * M, image, m, B, M, C * M, 1, IMAGES, BLOCK_M)
    total = tl.load(mass + images * C + which, mask=images < B, other=1.0)
    there = (images < B)[:, None] & (prompts < M)[None, :]
    return tl.where(there, exp(cosines) / total[:, None], 0.0), cosines


@triton.jit(do_not_specialize=["B"])
def pool_kernel(
    phrases, cosine, mass, pooled, B, C, M, D,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """pooled [B, C, D] = Σ_m weights_bcm phrases_cm."""
    which, image = tl.program_id(0) % C, tl.program_id(0) // C * IMAGES
    which64 = tl.cast(which, tl.int64)
    column = tl.program_id(1) * BLOCK_D
    acc = tl.zeros([IMAGES, BLOCK_D], tl.float32)
    for m in range(0, M, BLOCK_M):
        words = load_wide(phrases + which64 * M * D, m, column, M, D, D, 1, BLOCK_M, BLOCK_D)
        weights, _ = load_weights(cosine, mass, image, which, m, B, C, M, BLOCK_M)
        acc = dot(weights, words, acc, PRECISION)
    store_tile(pooled + which64 * D, acc, image, column, B, D, C * D)


def product_precision(dtype: torch.dtype) -> str:
    return precision(dtype) if dtype == torch.float32 else "tf32"


def phrase_block(phrases: int) -> int:
    return min(max(triton.next_power_of_2(phrases), 16), 64)


def cosines_of(cls: Tensor, phrases: Tensor, dpooled: Tensor | None) -> Cosines:
    batch, (classes, count, depth) = len(cls), phrases.shape
    cosine, mass = (cls.new_empty(shape, dtype=torch.float32) for shape in ((batch, classes, count), (batch, classes)))
    cls_scale, phrase_scale = (cls.new_empty(shape, dtype=torch.float32) for shape in ((batch,), (classes, count)))
    gradients = (None, None) if dpooled is None else (torch.empty_like(cosine), torch.empty_like(mass))
    found = Cosines(cosine, mass, cls_scale, phrase_scale, *gradients)
    phrase_cosine_kernel[(classes * triton.cdiv(batch, IMAGES.value),)](
        cls, phrases, dpooled, *found, batch, classes, count, depth,
        PRECISION=product_precision(cls.dtype), BLOCK_M=phrase_block(count), BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    return found


def phrase_pool(cls: Tensor, phrases: Tensor) -> Tensor:
    batch, (classes, count, depth) = len(cls), phrases.shape
    pooled = cls.new_empty(batch, classes, depth)
    if not pooled.numel():
        return pooled
    cls, phrases = cls.contiguous(), phrases.contiguous()
    with torch.cuda.device_of(cls):
        found = cosines_of(cls, phrases, None)
        pool_kernel[classes * triton.cdiv(batch, IMAGES.value), triton.cdiv(depth, 64)](
            phrases, found.cosine, found.mass, pooled, batch, classes, count, depth,
            PRECISION=product_precision(cls.dtype), BLOCK_M=phrase_block(count), BLOCK_D=64, num_warps=4,
        )  # fmt: skip
    return pooled


LIBRARY.impl("phrase_pool.triton", phrase_pool, "CompositeExplicitAutograd")
