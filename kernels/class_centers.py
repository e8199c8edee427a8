"""Triton implementation of fastcss::class_centers: softmax over the pixels of the logits, times the features.

There are 2 C N D FLOP for the 2 N D bytes of feats, 150 FLOP per byte at C = 150. So reading feats is the limit, and
they are read in place, by strides: a copy of an NCHW view would cost twice the op. Every program takes some classes,
some columns and a share of the pixels, with a softmax of its own that is rescaled as it goes; a second kernel brings
the shares to one scale and adds them in a fixed order. With over="classes" the softmax over pixels is of logits −
pixel_lse, which takes a pass over the logits before. Every lse is kept as two numbers, the largest logit and the
logarithm of the mass: in one number, a logit of 10⁴ would leave only three digits of the logarithm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_device import exp2
from .affinity_tiles import key_blocks_of_split
from .multi_lora import precision
from .multi_lora_device import dot, load_tile, store_tile
from .tuned import tuned

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return exp2(x * LOG2_E)


@triton.jit
def finite_or_zero(largest):
    """Return what a softmax subtracts: 0 if there was nothing but −∞ so far, since −∞ − (−∞) is NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def class_logits(
    logits, pixel_lse, c, n, C, N, last, stride_lc, stride_ln, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Load logits as float32 [BLOCK_C, BLOCK_N], less pixel_lse if that is given; −∞ outside of C and last."""
    classes, pixels = c + tl.arange(0, BLOCK_C), n + tl.arange(0, BLOCK_N)
    z = load_tile(logits, c, n, C, last, stride_lc, stride_ln, BLOCK_C, BLOCK_N).to(tl.float32)
    if pixel_lse is not None:
        z -= tl.load(pixel_lse + pixels, mask=pixels < last, other=0.0)[None, :]
        z -= tl.load(pixel_lse + N + pixels, mask=pixels < last, other=0.0)[None, :]
    return tl.where((classes < C)[:, None] & (pixels < last)[None, :], z, float("-inf"))


@triton.jit
def pixel_lse_kernel(
    logits, pixel_lse, C, N, stride_lb, stride_lc, stride_ln, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """pixel_lse [B, 2, N]: log Σ exp over the classes."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    for c in range(0, C, BLOCK_C):
        z = class_logits(logits + batch * stride_lb, None, c, n, C, N, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N)
        new_largest = tl.maximum(largest, tl.max(z, 0))
        base = finite_or_zero(new_largest)
        mass = mass * exp(largest - base) + tl.sum(exp(z - base[None, :]), 0)
        largest = new_largest
    pixels = n + tl.arange(0, BLOCK_N)
    to = pixel_lse + batch * 2 * N + pixels
    tl.store(to, finite_or_zero(largest), mask=pixels < N)
    tl.store(to + N, tl.log(mass), mask=pixels < N)


@triton.jit(do_not_specialize=["batches"])
def class_centers_kernel(
    logits, feats, pixel_lse, partial, partial_largest, partial_mass,
    C, N, D, batches, splits, split_blocks,
    stride_lb, stride_lc, stride_ln, stride_fb, stride_fn, stride_fd,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over one split of the pixels: Σ_n e_cn f_n [splits, B, C, D], e_cn = exp(z_cn − largest_c); largest; Σ e."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), max(tl.cdiv(D, BLOCK_D), 1)  # D = 0 still has a class_lse
    c = tl.program_id(0) % blocks_c * BLOCK_C
    column = tl.program_id(0) // blocks_c % blocks_d * BLOCK_D
    split = tl.program_id(0) // (blocks_c * blocks_d) % splits
    batch = tl.program_id(0) // (blocks_c * blocks_d) // splits
    batch64 = tl.cast(batch, tl.int64)
    logits += batch64 * stride_lb
    feats += batch64 * stride_fb
    if pixel_lse is not None:
        pixel_lse += batch64 * 2 * N
    largest = tl.full([BLOCK_C], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_C], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    first = split * split_blocks * BLOCK_N
    last = min(first + split_blocks * BLOCK_N, N)
    for n in range(first, last, BLOCK_N):
        z = class_logits(logits, pixel_lse, c, n, C, N, last, stride_lc, stride_ln, BLOCK_C, BLOCK_N)
        f_tile = load_tile(feats, n, column, last, D, stride_fn, stride_fd, BLOCK_N, BLOCK_D)
        new_largest = tl.maximum(largest, tl.max(z, 1))
        base = finite_or_zero(new_largest)
        shrink = exp(largest - base)
        weights = exp(z - base[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        acc = dot(weights.to(f_tile.dtype), f_tile, acc * shrink[:, None], PRECISION)
        largest = new_largest
    part = (tl.cast(split, tl.int64) * batches + batch) * C
    store_tile(partial + part * D, acc, c, column, C, D, D)
    classes = c + tl.arange(0, BLOCK_C)
    if column == 0:
        tl.store(partial_largest + part + classes, largest, mask=classes < C)
        tl.store(partial_mass + part + classes, mass, mask=classes < C)


@triton.jit(do_not_specialize=["batches"])
def combine_centers_kernel(
    partial, partial_largest, partial_mass, centers, class_lse, C, D, batches,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the splits to centers [B, C, D] and class_lse [B, 2, C]."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks * BLOCK_C
    batch = tl.program_id(0) // blocks
    column = tl.program_id(1) * BLOCK_D
    classes = c + tl.arange(0, BLOCK_C)
    largest = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        part = (tl.cast(split, tl.int64) * batches + batch) * C
        largest = tl.maximum(largest, tl.load(partial_largest + part + classes, mask=classes < C, other=0.0))
    base = finite_or_zero(largest)
    mass = tl.zeros([BLOCK_C], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        part = (tl.cast(split, tl.int64) * batches + batch) * C
        scale = exp(tl.load(partial_largest + part + classes, mask=classes < C, other=0.0) - base)
        mass += scale * tl.load(partial_mass + part + classes, mask=classes < C, other=1.0)
        acc += scale[:, None] * load_tile(partial + part * D, c, column, C, D, D, 1, BLOCK_C, BLOCK_D)
    batch64 = tl.cast(batch, tl.int64)
    store_tile(centers + batch64 * C * D, acc / mass[:, None], c, column, C, D, D)
    if column == 0:
        to = class_lse + batch64 * 2 * C + classes
        tl.store(to, base, mask=classes < C)
        tl.store(to + C, tl.log(mass), mask=classes < C)


@tuned("BLOCK_C", "BLOCK_N", "BLOCK_D")
def centers_tile(classes: int, rows_are_aligned: bool, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        c, n, d, stages = 32, 32, 128, 2
    elif not rows_are_aligned:  # rows of pixels begin anywhere: registers hold an address for every element
        c, n, d, stages = 64, 32, 64, 2
    else:
        c, n, (d, stages) = 64, 64, (64, 3) if classes <= 64 else (128, 2)
    return {"BLOCK_C": c, "BLOCK_N": n, "BLOCK_D": d, "num_warps": 4, "num_stages": stages}


def pixel_log_mass(logits: Tensor) -> Tensor:
    """Compute pixel_lse [B, 2, N]: the largest logit and the logarithm of the mass."""
    batches, classes, pixels = logits.shape
    pixel_lse = logits.new_empty(batches, 2, pixels, dtype=torch.float32)
    if pixel_lse.numel():
        pixel_lse_kernel[(batches * triton.cdiv(pixels, 32),)](
            logits, pixel_lse, classes, pixels, *logits.stride(), BLOCK_C=32, BLOCK_N=32, num_warps=4
        )
    return pixel_lse


def class_centers(logits: Tensor, feats: Tensor, over_classes: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batches, classes, pixels), depth = logits.shape, feats.shape[2]
    centers = feats.new_empty(batches, classes, depth)
    class_lse = logits.new_empty(batches, 2, classes, dtype=torch.float32)
    tile = centers_tile(classes, pixels % 16 == 0, feats.dtype)
    blocks = triton.cdiv(classes, tile["BLOCK_C"]) * max(triton.cdiv(depth, tile["BLOCK_D"]), 1)
    # A split's sums are 8 C D bytes, the features 2 N D.
    split_blocks = key_blocks_of_split(blocks, triton.cdiv(pixels, tile["BLOCK_N"]), classes / pixels)
    splits = triton.cdiv(triton.cdiv(pixels, tile["BLOCK_N"]), split_blocks)
    with torch.cuda.device_of(feats):
        pixel_lse = pixel_log_mass(logits) if over_classes else logits.new_empty(0, dtype=torch.float32)
        if batches:
            partial = feats.new_empty(splits, batches, classes, depth, dtype=torch.float32)
            largest, mass = feats.new_empty(2, splits, batches, classes, dtype=torch.float32)
            class_centers_kernel[(batches * splits * blocks,)](
                logits, feats, pixel_lse if over_classes else None, partial, largest, mass,
                classes, pixels, depth, batches, splits, split_blocks, *logits.stride(), *feats.stride(),
                PRECISION=precision(feats.dtype), **tile,
            )  # fmt: skip
            combine_centers_kernel[batches * triton.cdiv(classes, 8), max(triton.cdiv(depth, 128), 1)](
                partial, largest, mass, centers, class_lse, classes, depth, batches,
                SPLITS=splits, BLOCK_C=8, BLOCK_D=128, num_warps=4,
            )  # fmt: skip
    return centers, class_lse, pixel_lse


LIBRARY.impl("class_centers.triton", class_centers, "CompositeExplicitAutograd")
