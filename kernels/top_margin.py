"""Triton implementation of fastcss::top_margin and its backward: two logits and the softmax in one read.

A logit has 2 or 4 bytes and takes some ten instructions, one of them special. On a GPU of 4.3 TB/s reading bfloat16
takes no longer than the instructions, so both have to overlap. A thread holds the pixels of one 16-byte load and the
state of their softmax for all classes. A block of classes is loaded while the block before is looked at. The running
maximum, which is the larger of the two logits kept, changes once per block: that makes one exponential per logit. A
label's own logit is fetched beforehand: one load per pixel, mostly from a line that is read anyway, instead of two
instructions per logit.

Comparisons in that loop ignore NaN. It shows in the sum, and only pixels that have one are gone through again, with NaN
above all. Backward, p_j = exp(z_j − z_first) p_first from the saved p_first, one more read and one write: no sum of a
logit and a logarithm is rounded on the way, so the softmax is as exact for logits of 10⁴ as for logits of 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import exp, finite_or_zero
from .tuned import tuned

CLASSES = tl.constexpr(8)  # loads in flight


@triton.jit
def _of_class(c, C, there):
    """Return ``there``, or False everywhere for c ≥ C. Blocks are compared, as a block & a scalar is no mask in
    Triton's interpreter."""
    return there & (tl.full(there.shape, c, tl.int32) < C)


@triton.jit
def _load_classes(logits, c, C, stride_lc, there):
    """Load the pixels' logits of the classes from c on, −∞ beyond C."""
    block = ()
    for i in tl.static_range(CLASSES):
        offset = tl.cast(c + i, tl.int64) * stride_lc
        block += (tl.load(logits + offset, mask=_of_class(c + i, C, there), other=float("-inf")),)
    return block


@triton.jit
def _above(z, best, NAN: tl.constexpr):
    return (z > best) | ((z != z) & (best == best)) if NAN else z > best


@triton.jit
def _larger(best, z, NAN: tl.constexpr):
    return tl.where(_above(z, best, NAN), z, best) if NAN else tl.maximum(best, z)


@triton.jit
def _meet(z, c, true_logit, true, rival_logit, rival, LABELS: tl.constexpr, NAN: tl.constexpr):
    """Update the two logits and their classes by class c. If logits are equal, the one before stays."""
    if LABELS:
        other = tl.where(true == c, float("-inf"), z)
        rival = tl.where(_above(other, rival_logit, NAN), c, rival)
        rival_logit = _larger(rival_logit, other, NAN)
    else:
        first = _above(z, true_logit, NAN)
        rival = tl.where(first, true, tl.where(_above(z, rival_logit, NAN), c, rival))
        true = tl.where(first, c, true)
        if NAN:
            rival_logit = tl.where(first, true_logit, _larger(rival_logit, z, NAN))
        else:
            rival_logit = tl.maximum(rival_logit, tl.minimum(true_logit, z))
        true_logit = _larger(true_logit, z, NAN)
    return true_logit, true, rival_logit, rival


@triton.jit
def top_margin_kernel(
    logits, labels, margin, rival_out, p_true, p_rival, curvature, true_out, p_first,
    C, N, stride_lb, stride_lc, stride_ln, stride_yb, stride_yn, ignore_index,
    LABELS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write all outputs [B, N] for a block of pixels."""
    blocks = tl.cdiv(N, BLOCK_N)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    pixels = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    there = pixels < N
    label = tl.zeros([BLOCK_N], tl.int32)
    if LABELS:
        given = tl.load(labels + batch * stride_yb + pixels.to(tl.int64) * stride_yn, mask=there, other=0)
        ignored, known = given == ignore_index, (given >= 0) & (given < C)
        label = tl.where(known, given, -1).to(tl.int32)
    logits += batch * stride_lb + pixels.to(tl.int64) * stride_ln
    # These classes are the result if all logits are −∞.
    true, rival = label, tl.where(label == 0, 1, 0)
    true_logit = tl.full([BLOCK_N], float("-inf"), tl.float32)
    rival_logit = true_logit
    if LABELS:
        own = logits + label.to(tl.int64) * stride_lc
        true_logit = tl.load(own, mask=there & known, other=float("-inf")).to(tl.float32)
    base = tl.zeros([BLOCK_N], tl.float32)  # the softmax subtracts this
    mass = tl.zeros([BLOCK_N], tl.float32)
    block = _load_classes(logits, 0, C, stride_lc, there)
    for c in range(0, C, CLASSES):
        following = _load_classes(logits, c + CLASSES, C, stride_lc, there)
        for i in tl.static_range(CLASSES):
            true_logit, true, rival_logit, rival = _meet(
                block[i].to(tl.float32), c + i, true_logit, true, rival_logit, rival, LABELS, False
            )
        new_base = finite_or_zero(tl.maximum(true_logit, rival_logit))
        mass *= exp(tl.minimum(base - new_base, 0.0))  # above 0 only where there is no mass yet
        base = new_base
        for i in tl.static_range(CLASSES):
            mass += exp(block[i].to(tl.float32) - base)
        block = following
    if tl.max((mass != mass).to(tl.int32), 0) > 0:
        true, rival = label, tl.where(label == 0, 1, 0)
        rival_logit = tl.full([BLOCK_N], float("-inf"), tl.float32)
        true_logit = true_logit if LABELS else rival_logit
        for c in range(C):
            z = tl.load(logits + tl.cast(c, tl.int64) * stride_lc, mask=there, other=0.0).to(tl.float32)
            true_logit, true, rival_logit, rival = _meet(z, c, true_logit, true, rival_logit, rival, LABELS, True)
    rival = tl.where(rival == true, 1, rival)  # class 0 came first and nothing else is above −∞
    p_t, p_r = exp(true_logit - base) / mass, exp(rival_logit - base) / mass
    floats = (
        true_logit - rival_logit,
        p_t,
        p_r,
        (p_t + p_r) - (p_t - p_r) * (p_t - p_r),
        tl.maximum(p_t, p_r),
    )
    out = batch * N + pixels
    if LABELS:
        valid = known & ~ignored
        true, rival = tl.where(valid, true, -1), tl.where(valid, rival, -1)
    tl.store(true_out + out, true.to(tl.int64), mask=there)
    tl.store(rival_out + out, rival.to(tl.int64), mask=there)
    outputs = (margin, p_true, p_rival, curvature, p_first)
    for i in tl.static_range(5):
        value = floats[i]
        if LABELS:
            value = tl.where(ignored, 0.0, tl.where(known, value, float("nan")))
        tl.store(outputs[i] + out, value.to(outputs[i].dtype.element_ty), mask=there)


@triton.jit
def top_margin_gradient_kernel(
    dmargin, dp_true, dp_rival, dcurvature, logits, true_class, rival_class, p_first, dlogits,
    C, N, stride_lb, stride_lc, stride_ln, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dlogits [B, C, N] = dm (δ_jy − δ_jr) + a (δ_jy − p_j) + b (δ_jr − p_j), where with Δ = p_y − p_r
    a = p_y (dp_y + dκ (1 − 2Δ)) and b = p_r (dp_r + dκ (1 + 2Δ))."""
    blocks = tl.cdiv(N, BLOCK_N)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    pixels = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    there = pixels < N
    offset = batch * N + pixels
    y = tl.load(true_class + offset, mask=there, other=-1)
    r = tl.load(rival_class + offset, mask=there, other=-1)
    counted = y >= 0
    logits += batch * stride_lb + pixels.to(tl.int64) * stride_ln
    dlogits += batch * C * N + pixels
    p = tl.load(p_first + offset, mask=there, other=0.0)
    z_y = tl.load(logits + y * stride_lc, mask=counted, other=0.0).to(tl.float32)
    z_r = tl.load(logits + r * stride_lc, mask=counted, other=0.0).to(tl.float32)
    base = tl.maximum(z_y, z_r)
    p_y, p_r = exp(z_y - base) * p, exp(z_r - base) * p
    dm = tl.load(dmargin + offset, mask=there, other=0.0).to(tl.float32)
    dk = tl.load(dcurvature + offset, mask=there, other=0.0).to(tl.float32)
    difference = p_y - p_r
    a = p_y * (tl.load(dp_true + offset, mask=there, other=0.0).to(tl.float32) + dk * (1.0 - 2.0 * difference))
    b = p_r * (tl.load(dp_rival + offset, mask=there, other=0.0).to(tl.float32) + dk * (1.0 + 2.0 * difference))
    at_true, at_rival, both = dm + a, b - dm, (a + b) * p
    true, rival = y.to(tl.int32), r.to(tl.int32)
    block = _load_classes(logits, 0, C, stride_lc, there)
    for c in range(0, C, CLASSES):
        following = _load_classes(logits, c + CLASSES, C, stride_lc, there)
        for i in tl.static_range(CLASSES):
            dz = tl.where(true == c + i, at_true, tl.where(rival == c + i, at_rival, 0.0))
            dz = tl.where(counted, dz - both * exp(block[i].to(tl.float32) - base), 0.0)
            place = dlogits + tl.cast(c + i, tl.int64) * N
            tl.store(place, dz.to(dlogits.dtype.element_ty), mask=_of_class(c + i, C, there))
        block = following


@tuned("BLOCK_N")
def pixel_block(dtype: torch.dtype) -> dict[str, int]:
    """Choose a block with 16 bytes of pixels per thread, and registers for 512² pixels on 132 multiprocessors at
    once."""
    return {"BLOCK_N": 64 * (16 // dtype.itemsize), "num_warps": 2, "maxnreg": 255 if dtype.itemsize == 2 else 128}


def top_margin(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batches, classes, pixels = logits.shape
    margin, p_true, p_rival, curvature = (logits.new_empty(batches, pixels) for _ in range(4))
    rival, true = (logits.new_empty(batches, pixels, dtype=torch.int64) for _ in range(2))
    p_first = logits.new_empty(batches, pixels, dtype=torch.float32)
    given = labels.dim() == 2
    tile = pixel_block(logits.dtype)
    if p_first.numel():
        with torch.cuda.device_of(logits):
            top_margin_kernel[(batches * triton.cdiv(pixels, tile["BLOCK_N"]),)](
                logits, labels, margin, rival, p_true, p_rival, curvature, true, p_first,
                classes, pixels, *logits.stride(), *(labels.stride() if given else (0, 0)), ignore_index,
                LABELS=given, **tile,
            )  # fmt: skip
    return margin, rival, p_true, p_rival, curvature, true, p_first


def top_margin_backward(
    dmargin: Tensor,
    dp_true: Tensor,
    dp_rival: Tensor,
    dcurvature: Tensor,
    logits: Tensor,
    true: Tensor,
    rival: Tensor,
    p_first: Tensor,
) -> Tensor:
    batches, classes, pixels = logits.shape
    dlogits = logits.new_empty(logits.shape)
    tile = pixel_block(logits.dtype)
    if dlogits.numel():
        per_pixel = (x.contiguous() for x in (dmargin, dp_true, dp_rival, dcurvature))
        saved = (x.contiguous() for x in (true, rival, p_first))
        with torch.cuda.device_of(logits):
            top_margin_gradient_kernel[(batches * triton.cdiv(pixels, tile["BLOCK_N"]),)](
                *per_pixel, logits, *saved, dlogits, classes, pixels, *logits.stride(), **tile
            )
    return dlogits


LIBRARY.impl("top_margin.triton", top_margin, "CompositeExplicitAutograd")
LIBRARY.impl("top_margin_backward.triton", top_margin_backward, "CompositeExplicitAutograd")
