"""Device code of fastcss::multi_lora: shrink (h = scale · x Aᵀ), expand (y = x Wᵀ + h B) and both in one loop."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (slot, row block, column block). Eight row blocks in turn use a weight tile while it is in L2."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    slot = pid // (blocks_m * blocks_n)
    pid = pid % (blocks_m * blocks_n)
    first = pid // (8 * blocks_n) * 8
    size = min(blocks_m - first, 8)
    within = pid % (8 * blocks_n)
    return slot, first + within % size, within // size


@triton.jit
def adapter_of(slot, offsets, index, num_adapters):
    """Return (adapter, first row, rank, valid) of a slot. Index -1 has rank 0; so has a wrong one, which is not
    valid."""
    adapter = slot if index is None else tl.load(index + slot)
    known = (adapter >= 0) & (adapter < num_adapters)
    start = tl.load(offsets + adapter, mask=known, other=0)
    rank = tl.load(offsets + adapter + 1, mask=known, other=0) - start
    return adapter, start, rank, known | (adapter == -1)


@triton.jit
def load_tile(
    base, row, column, num_rows, num_columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load the tile of a strided matrix that begins at (row, column), 0 outside of it. Offsets have 64 bits, as strides
    may be any."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    offset = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(base + offset, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def store_tile(base, tile, row, column, num_rows, num_columns, stride_row):
    rows = row + tl.arange(0, tile.shape[0])
    columns = column + tl.arange(0, tile.shape[1])
    offset = rows[:, None].to(tl.int64) * stride_row + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(base + offset, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    # The interpreter would multiply the bit patterns of bfloat16, and its BLAS adds up float32 in an order that depends
    # on the place in the tile, which no GPU does.
    if INTERPRETING:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _add_bias(acc, bias, column, N):
    if bias is not None:
        columns = column + tl.arange(0, acc.shape[1])
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def shrink_kernel(
    x, down, h, offsets, scales, index,
    M, K, width, num_adapters, stride_xs, stride_xm, stride_xk, stride_hs, stride_hm,
    STACKED: tl.constexpr, SEARCH_STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = scale · x downᵀ for one slot, or, STACKED, for all the rows of ``down`` as one matrix."""
    slot, block_m, block_r = tile_of(tl.program_id(0), M, width, BLOCK_M, BLOCK_R)
    row, column = block_m * BLOCK_M, block_r * BLOCK_R
    columns = column + tl.arange(0, BLOCK_R)
    if STACKED:
        rank = width
        # The adapter that owns a row of down is the last t with offsets[t] <= row: binary search.
        adapter = tl.zeros([BLOCK_R], tl.int32)
        for step in tl.static_range(SEARCH_STEPS):
            probe = adapter + (1 << (SEARCH_STEPS - 1 - step))
            first = tl.load(offsets + probe, mask=probe < num_adapters, other=width)
            adapter = tl.where(first <= columns, probe, adapter)
        scale = tl.load(scales + adapter, mask=columns < width, other=0.0)
    else:
        adapter, start, rank, _ = adapter_of(slot, offsets, index, num_adapters)
        scale = tl.zeros([BLOCK_R], tl.float32) + tl.load(scales + adapter, mask=rank > 0, other=0.0)
        x += tl.cast(slot, tl.int64) * stride_xs
        down += start.to(tl.int64) * K
        h += start if index is None else tl.cast(slot, tl.int64) * stride_hs
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, tl.where(column < rank, K, 0), BLOCK_K):
        x_tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        down_tile = load_tile(down, k, column, K, rank, 1, K, BLOCK_K, BLOCK_R).to(x_tile.dtype)
        acc = dot(x_tile, down_tile, acc, PRECISION)
    # h is 0 beyond the rank even if x is not finite.
    acc = tl.where((columns < rank)[None, :], acc * scale[None, :], 0.0)
    store_tile(h, acc, row, column, M, rank if index is None else width, stride_hm)


@triton.jit
def _add_delta(
    acc, h, up, row, column, M, N, rank, stride_hm, dtype: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute acc + h up, over the true rank."""
    if ONE_BLOCK:  # without an inner loop the loop over slots can be pipelined
        h_tile = load_tile(h, row, 0, M, rank, stride_hm, 1, BLOCK_M, BLOCK_R).to(dtype)
        up_tile = load_tile(up, 0, column, rank, N, N, 1, BLOCK_R, BLOCK_N).to(dtype)
        acc = dot(h_tile, up_tile, acc, PRECISION)
    else:
        for r in range(0, rank, BLOCK_R):
            h_tile = load_tile(h, row, r, M, rank, stride_hm, 1, BLOCK_M, BLOCK_R).to(dtype)
            up_tile = load_tile(up, r, column, rank, N, N, 1, BLOCK_R, BLOCK_N).to(dtype)
            acc = dot(h_tile, up_tile, acc, PRECISION)
    return acc


@triton.jit
def _slot_output(
    acc, slot, h, up, offsets, index, row, column, M, N, num_adapters, stride_hs, stride_hm, dtype: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    _, start, rank, valid = adapter_of(slot, offsets, index, num_adapters)
    h += start if index is None else tl.cast(slot, tl.int64) * stride_hs
    up += start.to(tl.int64) * N
    out = _add_delta(
        acc, h, up, row, column, M, N, rank, stride_hm, dtype, ONE_BLOCK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R
    )
    return out if index is None else tl.where(valid, out, float("nan"))


@triton.jit
def expand_kernel(
    x, weight, bias, up, h, y, offsets, index,
    M, N, K, slots, num_adapters, stride_xs, stride_xm, stride_xk, stride_wn, stride_wk, stride_hs, stride_hm,
    OVER_SLOTS: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute the base tile x Wᵀ + bias, and add h_s up_t to it.

    OVER_SLOTS: "none", the tile belongs to one slot; "write", every slot adds to the same base and writes its own y;
    "sum", all slots add to the base and y is written once (the gradient of a shared x).
    """
    slot, block_m, block_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    row, column = block_m * BLOCK_M, block_n * BLOCK_N
    x += tl.cast(slot, tl.int64) * stride_xs
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        w_tile = load_tile(weight, k, column, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N)
        acc = dot(x_tile, w_tile, acc, PRECISION)
    acc = _add_bias(acc, bias, column, N)

    if OVER_SLOTS == "none":
        acc = _slot_output(
            acc, slot, h, up, offsets, index, row, column, M, N, num_adapters, stride_hs, stride_hm, dtype,
            ONE_BLOCK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        store_tile(y + tl.cast(slot, tl.int64) * M * N, acc, row, column, M, N, N)
    else:
        for s in range(slots):
            out = _slot_output(
                acc, s, h, up, offsets, index, row, column, M, N, num_adapters, stride_hs, stride_hm, dtype,
                ONE_BLOCK, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            if OVER_SLOTS == "sum":
                acc = out
            else:
                store_tile(y + tl.cast(s, tl.int64) * M * N, out, row, column, M, N, N)
        if OVER_SLOTS == "sum":
            store_tile(y, acc, row, column, M, N, N)


@triton.jit
def fused_kernel(
    x, weight, bias, down, up, h, y, offsets, scales, index,
    M, N, K, num_adapters, stride_xs, stride_xm, stride_xk, stride_wn, stride_wk, stride_hs, stride_hm,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute one layer in one launch: every tile of x feeds the base and the shrink, whose whole rank is in
    registers."""
    slot, block_m, block_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    row, column = block_m * BLOCK_M, block_n * BLOCK_N
    ranks = tl.arange(0, BLOCK_R)
    adapter, start, rank, valid = adapter_of(slot, offsets, index, num_adapters)
    x += tl.cast(slot, tl.int64) * stride_xs
    down += start.to(tl.int64) * K
    up += start.to(tl.int64) * N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
        w_tile = load_tile(weight, k, column, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N)
        down_tile = load_tile(down, k, 0, K, rank, 1, K, BLOCK_K, BLOCK_R).to(x_tile.dtype)
        acc = dot(x_tile, w_tile, acc, PRECISION)
        hidden = dot(x_tile, down_tile, hidden, PRECISION)
    # h is 0 beyond the rank even if x is not finite.
    scale = tl.load(scales + adapter, mask=rank > 0, other=0.0)
    hidden = tl.where((ranks < rank)[None, :], hidden * scale, 0.0)
    if h is not None and block_n == 0:
        if index is None:
            store_tile(h + start, hidden, row, 0, M, rank, stride_hm)
        else:
            store_tile(h + tl.cast(slot, tl.int64) * stride_hs, hidden, row, 0, M, stride_hm, stride_hm)
    dtype: tl.constexpr = x.dtype.element_ty
    up_tile = load_tile(up, 0, column, rank, N, N, 1, BLOCK_R, BLOCK_N).to(dtype)
    acc = dot(hidden.to(dtype), up_tile, _add_bias(acc, bias, column, N), PRECISION)
    if index is not None:
        acc = tl.where(valid, acc, float("nan"))
    store_tile(y + tl.cast(slot, tl.int64) * M * N, acc, row, column, M, N, N)
