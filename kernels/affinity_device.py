"""Device code that the affinity ops share: tanh, the sums over pixels, and the sum of the splits' results."""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_lora_device import INTERPRETING, load_tile, store_tile


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """(tanh x, its derivative 1 − tanh² x).

    FAST is one special-function op with a relative error of 2⁻¹¹: an eighth of a rounding of bfloat16, half a rounding
    of float16. That is never more than what eager code loses by rounding the affinity M: near M = 1 it loses 2⁻⁹ or
    2⁻¹² of 1 − M, and so does the derivative 4 M (1 − M).
    """
    if FAST and not INTERPRETING:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
        return t, 1.0 - t * t
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(−2|x|), which cannot overflow
    r = 1.0 / (1.0 + e)
    t = (1.0 - e) * r
    return tl.where(x < 0, -t, t), 4.0 * e * r * r


@triton.jit
def exp2(x):
    """Compute 2^x by one special-function op. Results below 2⁻¹²⁶ are 0."""
    if INTERPRETING:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """Compute 1/x by one special-function op, exact to a unit in the last place."""
    if INTERPRETING:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def column_total(sums, batch, column, batches, chunks, D, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up the sums over chunks of pixels, [chunks, B, D], to sums over all pixels, [COLUMNS]."""
    tile = load_tile(
        sums + tl.cast(batch, tl.int64) * D, 0, column, chunks, D, tl.cast(batches, tl.int64) * D, 1, CHUNKS, COLUMNS
    )
    return tl.sum(tile, 0)


@triton.jit(do_not_specialize=["batches"])
def column_sums_kernel(
    x, y, difference, sums,
    N, width, D, batches, chunks, per_chunk,
    stride_xb, stride_xn, stride_xd, stride_yb, stride_yn, stride_yd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum x, or ½ (x + y) if y is given, over chunks of pixels: [chunks, B, D].

    ``difference`` [B, N, D] gets x, or ½ (x − y), in rows padded with zeros to D columns, unless it is None.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    column = tl.program_id(0) % blocks * BLOCK_D
    chunk = tl.program_id(0) // blocks % chunks
    batch = tl.program_id(0) // blocks // chunks
    batch64 = tl.cast(batch, tl.int64)
    x += batch64 * stride_xb
    if y is not None:
        y += batch64 * stride_yb
    if difference is not None:
        difference += batch64 * N * D
    first = chunk * per_chunk
    last = min(first + per_chunk, N)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for n in range(first, last, BLOCK_N):
        tile = load_tile(x, n, column, last, width, stride_xn, stride_xd, BLOCK_N, BLOCK_D).to(tl.float32)
        half = tile
        if y is not None:
            other = load_tile(y, n, column, last, width, stride_yn, stride_yd, BLOCK_N, BLOCK_D).to(tl.float32)
            half = 0.5 * tile - 0.5 * other
            tile = 0.5 * tile + 0.5 * other
        total += tile
        if difference is not None:
            store_tile(difference, half, n, column, last, D, D)
    sums += (tl.cast(chunk, tl.int64) * batches + batch) * D
    columns = column + tl.arange(0, BLOCK_D)
    tl.store(sums + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit(do_not_specialize=["batches"])
def combine_kernel(
    partial, sums, plus, minus, device_factor, factor,
    N, width, D, batches, chunks,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """plus = factor · (total + Σ partial) and minus = factor · (total − Σ partial), for partial [PARTS, B, N, D].

    The total of a column comes from ``sums``, or is 0 if that is None; ``minus`` may be None; ``device_factor``, one
    float32 or None, multiplies the factor.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.program_id(0) // blocks
    column = tl.program_id(1) * BLOCK_D
    batch64 = tl.cast(batch, tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):  # unrolled: all loads are in flight at once
        total += load_tile(partial + (tl.cast(part, tl.int64) * batches + batch) * N * D,
                           row, column, N, D, D, 1, BLOCK_N, BLOCK_D)  # fmt: skip
    if device_factor is not None:
        factor *= tl.load(device_factor)
    plus += batch64 * N * width
    if sums is None:
        store_tile(plus, total * factor, row, column, N, width, width)
    else:
        base = column_total(sums, batch, column, batches, chunks, D, CHUNKS, BLOCK_D)[None, :]
        store_tile(plus, (base + total) * factor, row, column, N, width, width)
        if minus is not None:
            store_tile(minus + batch64 * N * width, (base - total) * factor, row, column, N, width, width)
