"""Triton implementation of fastcss::class_centers_backward.

Let w_cn = exp(logits_cn − pixel_lse_n − class_lse_c), dC be the gradient of the centres, and G_cn = dC_c · f_n:

    df_n = Σ_c w_cn dC_c,   dz_cn = w_cn (G_cn − δ_c),   δ_c = Σ_n w_cn G_cn
    dlogits_cn = dz_cn over pixels, dz_cn − p_cn Σ_c' dz_c'n over classes, p_cn = exp(logits_cn − pixel_lse_n)

δ_c is also dC_c · C_c, but the centre C_c is known only as it was rounded. If one pixel makes up a class, G − δ is
nearly 0, and that rounding would be the error. So G is written to where dlogits goes, δ is the sum of what was written,
and a third kernel turns G into dlogits in place. Nothing but sums [blocks of pixels, B, C] is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import centers_tile, class_logits, exp
from .multi_lora import precision
from .multi_lora_device import dot, load_tile, store_tile


@triton.jit
def class_weights(
    logits, pixel_lse, class_lse, c, n, C, N, stride_lc, stride_ln, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(w [BLOCK_C, BLOCK_N], logits less pixel_lse)."""
    classes = c + tl.arange(0, BLOCK_C)
    z = class_logits(logits, pixel_lse, c, n, C, N, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N)
    largest = tl.load(class_lse + classes, mask=classes < C, other=0.0)
    log_mass = tl.load(class_lse + C + classes, mask=classes < C, other=0.0)
    return exp((z - largest[:, None]) - log_mass[:, None]), z


@triton.jit(do_not_specialize=["batches"])
def center_gradient_dots_kernel(
    dcenters, logits, feats, class_lse, pixel_lse, dots, sums,
    C, N, D, batches, stride_lb, stride_lc, stride_ln, stride_fb, stride_fn, stride_fd,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dots [B, C, N] = G, and ``sums`` [blocks of pixels, B, C] = Σ_n w_cn G_cn of G as it was rounded."""
    blocks_c, blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(N, BLOCK_N)
    c = tl.program_id(0) % blocks_c * BLOCK_C
    block = tl.program_id(0) // blocks_c % blocks
    n = block * BLOCK_N
    batch = tl.program_id(0) // blocks_c // blocks
    batch64 = tl.cast(batch, tl.int64)
    dcenters += batch64 * C * D
    feats += batch64 * stride_fb
    if pixel_lse is not None:
        pixel_lse += batch64 * 2 * N
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for column in range(0, D, BLOCK_D):
        dc_tile = load_tile(dcenters, c, column, C, D, D, 1, BLOCK_C, BLOCK_D)
        f_tile = load_tile(feats, column, n, D, N, stride_fd, stride_fn, BLOCK_D, BLOCK_N)
        acc = dot(dc_tile, f_tile, acc, PRECISION)
    g = acc.to(dots.dtype.element_ty)
    store_tile(dots + batch64 * C * N, g, c, n, C, N, N)
    w, _ = class_weights(
        logits + batch64 * stride_lb, pixel_lse, class_lse + batch64 * 2 * C, c, n, C, N, stride_lc, stride_ln,
        BLOCK_C, BLOCK_N,
    )  # fmt: skip
    classes = c + tl.arange(0, BLOCK_C)
    sums += (tl.cast(block, tl.int64) * batches + batch) * C
    tl.store(sums + classes, tl.sum(w * g.to(tl.float32), 1), mask=classes < C)


@triton.jit
def feats_gradient_kernel(
    dcenters, logits, class_lse, pixel_lse, dfeats,
    C, N, D, stride_lb, stride_lc, stride_ln,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dfeats [B, N, D] = Σ_c w_cn dC_c."""
    blocks, blocks_d = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    column = tl.program_id(0) % blocks_d * BLOCK_D
    n = tl.program_id(0) // blocks_d % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks_d // blocks, tl.int64)
    dcenters += batch * C * D
    logits += batch * stride_lb
    class_lse += batch * 2 * C
    if pixel_lse is not None:
        pixel_lse += batch * 2 * N
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for c in range(0, C, BLOCK_C):
        w, _ = class_weights(logits, pixel_lse, class_lse, c, n, C, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N)
        dc_tile = load_tile(dcenters, c, column, C, D, D, 1, BLOCK_C, BLOCK_D)
        acc = dot(tl.trans(w).to(dc_tile.dtype), dc_tile, acc, PRECISION)
    store_tile(dfeats + batch * N * D, acc, n, column, N, D, D)


@triton.jit
def _score_gradient(
    dlogits, logits, class_lse, pixel_lse, delta, c, n, C, N, stride_lc, stride_ln,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dz, logits less pixel_lse) where dlogits still holds G."""
    classes = c + tl.arange(0, BLOCK_C)
    w, z = class_weights(logits, pixel_lse, class_lse, c, n, C, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N)
    g = load_tile(dlogits, c, n, C, N, N, 1, BLOCK_C, BLOCK_N).to(tl.float32)
    return w * (g - tl.load(delta + classes, mask=classes < C, other=0.0)[:, None]), z


@triton.jit
def logits_gradient_kernel(
    dlogits, logits, class_lse, pixel_lse, delta,
    C, N, classes_per_program, stride_lb, stride_lc, stride_ln, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dlogits [B, C, N] from G, in place; over classes a program has all of them."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    first = tl.program_id(1) * classes_per_program
    last = min(first + classes_per_program, C)
    dlogits += batch * C * N
    logits += batch * stride_lb
    class_lse += batch * 2 * C
    delta += batch * C
    total = tl.zeros([BLOCK_N], tl.float32)
    if pixel_lse is not None:
        pixel_lse += batch * 2 * N
        for c in range(first, last, BLOCK_C):
            dz, _ = _score_gradient(
                dlogits, logits, class_lse, pixel_lse, delta, c, n, C, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N
            )
            total += tl.sum(dz, 0)
    for c in range(first, last, BLOCK_C):
        dz, z = _score_gradient(
            dlogits, logits, class_lse, pixel_lse, delta, c, n, C, N, stride_lc, stride_ln, BLOCK_C, BLOCK_N
        )
        if pixel_lse is not None:
            dz -= exp(z) * total[None, :]
        store_tile(dlogits, dz, c, n, C, N, N)


def class_centers_backward(
    dcenters: Tensor, logits: Tensor, feats: Tensor, centers: Tensor, class_lse: Tensor, pixel_lse: Tensor
) -> tuple[Tensor, Tensor]:
    (batches, classes, pixels), depth = logits.shape, feats.shape[2]
    dlogits, dfeats = logits.new_empty(logits.shape), feats.new_empty(feats.shape)
    if not dlogits.numel():
        return dlogits, dfeats
    over_classes = pixel_lse.dim() == 3
    tile = centers_tile(classes, pixels % 16 == 0, feats.dtype)
    blocks_c, blocks, blocks_d = (
        triton.cdiv(size, tile[name])
        for size, name in ((classes, "BLOCK_C"), (pixels, "BLOCK_N"), (depth, "BLOCK_D"))
    )  # fmt: skip
    dcenters, class_lse = dcenters.contiguous(), class_lse.contiguous()
    pixel_lse = pixel_lse.contiguous() if over_classes else None
    with torch.cuda.device_of(feats):
        sums = class_lse.new_empty(blocks, batches, classes)
        center_gradient_dots_kernel[(batches * blocks * blocks_c,)](
            dcenters, logits, feats, class_lse, pixel_lse, dlogits, sums,
            classes, pixels, depth, batches, *logits.stride(), *feats.stride(),
            PRECISION=precision(feats.dtype), **tile,
        )  # fmt: skip
        if depth:
            feats_gradient_kernel[(batches * blocks * blocks_d,)](
                dcenters, logits, class_lse, pixel_lse, dfeats, classes, pixels, depth, *logits.stride(),
                PRECISION=precision(feats.dtype), **tile,
            )  # fmt: skip
        per_program = classes if over_classes else 32
        logits_gradient_kernel[batches * triton.cdiv(pixels, 32), triton.cdiv(classes, per_program)](
            dlogits, logits, class_lse, pixel_lse, sums.sum(0), classes, pixels, per_program, *logits.stride(),
            BLOCK_C=32, BLOCK_N=32, num_warps=4,
        )  # fmt: skip
    return dlogits, dfeats


LIBRARY.impl("class_centers_backward.triton", class_centers_backward, "CompositeExplicitAutograd")
