"""Triton implementation of fastcss::relative_attention_backward.

Let P be the attention, dP = dout vᵀ, δ = Σ out dout of a query, and dS = P (dP − δ):

    dv = Pᵀ dout,   dk = scale dSᵀ q,   dq = scale dS k + dbias · tables,   dtable = dbiasᵀ q at each distance

dbias [N, Sh + Sw] are the sums of a query's dS over the columns of each row, and over the rows of each column. One
kernel goes over blocks of queries and computes δ, dbias and dS k; one over tiles of keys computes dk and dv. Both make
P from the statistics of the forward pass: 7 products, and not the 5 of one kernel that would add dq atomically, in
another order every time. The products with the tables are kernels of their own (relative_attention_tables), and what
programs leave as parts, the tables' gradients and those of the tokens that fill up, is added in a fixed order.

A tile of keys is 4 rows of 16 columns: the bias of its queries, read anew for each block of them, is 20 numbers then,
and would be 65 with one row of 64. By the compiled loops L2 limits the keys' kernel at 64², with 64 keys a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch.private_apis import gpu_architecture
from .._schema import LIBRARY
from .multi_lora import _operands_stay_in_shared_memory
from .multi_lora_device import dot
from .relative_attention import Operands, check_width, table_tile
from .relative_attention_device import (
    exp_above,
    head_of,
    keys_at,
    load_bias,
    load_keys,
    load_queries,
    load_rows,
    load_statistics,
    products,
    program_at,
    queries_at,
    queries_in,
    scores_of,
    store_rows,
)
from .relative_attention_tables import query_bias_gradient_kernel, table_gradient_kernel
from .tuned import tuned
from .window_attention_backward import sum_parts


@triton.jit
def query_gradient_kernel(
    dout, q, k, v, bias, pad_key, pad_value, out, stats, dq, dbias, delta,
    q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, Sh, Sw, heads, blocks, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, FILLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write δ, dbias and the part of dq that comes through the products, in float32, of a block of queries."""
    sizes = (H, W, Sh, Sw)
    sample, head, _, corner, block = program_at(sizes, heads, blocks)
    rows, columns = queries_in(sizes, corner)
    start = block * BLOCK
    if start >= rows * columns:
        return
    place = queries_at(start, sizes, corner, BLOCK, WHOLE)
    there = place[2]
    token = (place[0] * W + place[1]).to(tl.int64)
    of_head = (sample * heads + head) * H * W
    first = (sample * H * W * heads + head) * D
    dout_tiles = load_rows(dout + first, token * (heads * D), D, MAIN, TAIL)
    out_tiles = load_rows(out + first, token * (heads * D), D, MAIN, TAIL)
    # δ is summed in the same way as dP: where a query reads one key alone, the two must be equal.
    index = tl.arange(0, BLOCK)
    own = products(dout_tiles, out_tiles, TAIL, PRECISION)
    own = tl.sum(tl.where(index[:, None] == index[None, :], own, 0.0), 1)
    tl.store(delta + of_head + token, own, mask=there)
    q_tiles = load_queries(head_of(q, q_strides, sample, head), q_strides, place, D, MAIN, TAIL)
    largest, inverse = load_statistics(stats + of_head * 2, place, sizes)
    k, v = head_of(k, k_strides, sample, head), head_of(v, v_strides, sample, head)
    pad_key += sample * key_pad_strides[0] + tl.cast(head, tl.int64) * key_pad_strides[1]
    pad_value += sample * value_pad_strides[0] + tl.cast(head, tl.int64) * value_pad_strides[1]
    bias += of_head * (Sh + Sw)
    dbias += of_head * (Sh + Sw)
    dbias_rows = dbias + (token * (Sh + Sw))[:, None]
    acc = tl.zeros([BLOCK, MAIN], tl.float32)
    tail = tl.zeros([BLOCK, TAIL if TAIL else 1], tl.float32)
    for column in range(0, Sw, COLUMNS):
        start += column // Sw  # 0, or else the compiler would keep the queries' places in registers, for the end
        bias_w = load_bias(bias, place, Sh + column + tl.arange(0, COLUMNS), Sh + Sw, sizes, MASKED)
        dbias_w = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for row in range(0, Sh, ROWS):
            k_tiles = load_keys(
                k, k_strides, pad_key, row, column, sizes, corner, D, MAIN, TAIL, ROWS, COLUMNS, MASKED, FILLED
            )  # fmt: skip
            v_tiles = load_keys(
                v, v_strides, pad_value, row, column, sizes, corner, D, MAIN, TAIL, ROWS, COLUMNS, MASKED, FILLED
            )  # fmt: skip
            bias_h = load_bias(bias, place, row + tl.arange(0, ROWS), Sh, sizes, MASKED)
            scores = scores_of(products(q_tiles, k_tiles, TAIL, PRECISION), bias_w, scale, ROWS, COLUMNS)
            weights = exp_above(scores, bias_h, largest, q.dtype.element_ty == tl.float32)
            dweights = products(dout_tiles, v_tiles, TAIL, PRECISION) - own[:, None]
            dscores = weights * inverse[:, None] * dweights
            by_row = tl.reshape(dscores, [BLOCK, ROWS, COLUMNS])
            dbias_w += tl.sum(by_row, 1)
            numbers = row + tl.arange(0, ROWS)[None, :]
            dbias_h = tl.sum(by_row, 2)
            # The sum over columns goes on where the tile of columns before left it.
            dbias_h += tl.load(dbias_rows + numbers, mask=numbers < tl.where(column > 0, Sh, 0), other=0.0)
            tl.store(dbias_rows + numbers, dbias_h, mask=there[:, None] & (numbers < Sh))
            dscores = dscores.to(q.dtype.element_ty)
            acc = dot(dscores, k_tiles[0], acc, PRECISION)
            if TAIL:
                tail = dot(dscores, k_tiles[1], tail, PRECISION)
        numbers = column + tl.arange(0, COLUMNS)[None, :]
        tl.store(dbias_rows + Sh + numbers, dbias_w, mask=there[:, None] & (numbers < Sw))
        tl.debug_barrier()  # other threads may read the sums over rows that this one wrote
    place = queries_at(start, sizes, corner, BLOCK, WHOLE)
    token = (place[0] * W + place[1]).to(tl.int64)
    store_rows(dq + first, (acc * scale, tail * scale), token * (heads * D), place[2], D, MAIN, TAIL)


@triton.jit(do_not_specialize=["batches"])
def key_gradient_kernel(
    dout, q, k, v, bias, pad_key, pad_value, stats, delta, dk, dv, key_parts, value_parts,
    q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, Sh, Sw, heads, blocks, batches, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, FILLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a tile of keys, and the sums over those that fill up, [windows, tiles, B, heads, D]."""
    sizes = (H, W, Sh, Sw)
    sample, head, number, corner, block = program_at(sizes, heads, blocks)
    rows, columns = queries_in(sizes, corner)
    across = tl.cdiv(Sw, COLUMNS)
    row, column = block // across * ROWS, block % across * COLUMNS
    of_head = (sample * heads + head) * H * W
    first = (sample * H * W * heads + head) * D
    pad_key += sample * key_pad_strides[0] + tl.cast(head, tl.int64) * key_pad_strides[1]
    pad_value += sample * value_pad_strides[0] + tl.cast(head, tl.int64) * value_pad_strides[1]
    k_tiles = load_keys(
        head_of(k, k_strides, sample, head), k_strides, pad_key, row, column, sizes, corner, D, MAIN, TAIL,
        ROWS, COLUMNS, MASKED, FILLED,
    )  # fmt: skip
    v_tiles = load_keys(
        head_of(v, v_strides, sample, head), v_strides, pad_value, row, column, sizes, corner, D, MAIN, TAIL,
        ROWS, COLUMNS, MASKED, FILLED,
    )  # fmt: skip
    q = head_of(q, q_strides, sample, head)
    bias += of_head * (Sh + Sw)
    dtype: tl.constexpr = q.dtype.element_ty
    dk_main = tl.zeros([ROWS * COLUMNS, MAIN], tl.float32)
    dv_main = tl.zeros([ROWS * COLUMNS, MAIN], tl.float32)
    dk_tail = tl.zeros([ROWS * COLUMNS, TAIL if TAIL else 1], tl.float32)
    dv_tail = tl.zeros([ROWS * COLUMNS, TAIL if TAIL else 1], tl.float32)
    # What is no key has any weights, as its gradients are not stored; but what is read for it must be there.
    numbers_h = tl.minimum(row + tl.arange(0, ROWS), Sh - 1)
    numbers_w = Sh + tl.minimum(column + tl.arange(0, COLUMNS), Sw - 1)
    for query in range(0, rows * columns, BLOCK):
        place = queries_at(query, sizes, corner, BLOCK, WHOLE)
        token = (place[0] * W + place[1]).to(tl.int64)
        q_tiles = load_queries(q, q_strides, place, D, MAIN, TAIL)
        dout_tiles = load_rows(dout + first, token * (heads * D), D, MAIN, TAIL)
        largest, inverse = load_statistics(stats + of_head * 2, place, sizes)
        own = tl.load(delta + of_head + token)
        bias_w = load_bias(bias, place, numbers_w, Sh + Sw, sizes, False)
        bias_h = load_bias(bias, place, numbers_h, Sh, sizes, False)
        scores = scores_of(products(q_tiles, k_tiles, TAIL, PRECISION), bias_w, scale, ROWS, COLUMNS)
        weights = exp_above(scores, bias_h, largest, q.dtype.element_ty == tl.float32) * inverse[:, None]
        dscores = weights * (products(dout_tiles, v_tiles, TAIL, PRECISION) - own[:, None])
        weights, dscores = tl.trans(weights.to(dtype)), tl.trans(dscores.to(dtype))
        dv_main = dot(weights, dout_tiles[0], dv_main, PRECISION)
        dk_main = dot(dscores, q_tiles[0], dk_main, PRECISION)
        if TAIL:
            dv_tail = dot(weights, dout_tiles[1], dv_tail, PRECISION)
            dk_tail = dot(dscores, q_tiles[1], dk_tail, PRECISION)
    dk_main, dk_tail = dk_main * scale, dk_tail * scale
    keys = tl.arange(0, ROWS * COLUMNS)
    token = ((corner[0] + row + keys // COLUMNS) * W + corner[1] + column + keys % COLUMNS).to(tl.int64)
    in_map, is_key = keys_at(row, column, sizes, corner, ROWS, COLUMNS)
    store_rows(dk + first, (dk_main, dk_tail), token * (heads * D), in_map, D, MAIN, TAIL)
    store_rows(dv + first, (dv_main, dv_tail), token * (heads * D), in_map, D, MAIN, TAIL)
    if FILLED:
        filled = (is_key & ~in_map)[:, None]
        windows = tl.cdiv(H, Sh) * tl.cdiv(W, Sw)
        slot = tl.cast(number % windows * blocks + block, tl.int64)
        slot = ((slot * batches + sample) * heads + head) * D
        _store_sum(key_parts + slot, dk_main, filled, D, 0)
        _store_sum(value_parts + slot, dv_main, filled, D, 0)
        if TAIL:
            _store_sum(key_parts + slot, dk_tail, filled, D, MAIN)
            _store_sum(value_parts + slot, dv_tail, filled, D, MAIN)


@triton.jit
def _store_sum(parts, tile, mask, D: tl.constexpr, FIRST: tl.constexpr):
    channels = FIRST + tl.arange(0, tile.shape[1])
    tl.store(parts + channels, tl.sum(tl.where(mask, tile, 0.0), 0), mask=channels < D)


@tuned("BLOCK", "KEYS")
def query_tile(queries: int, window: bool, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile for so many queries of a window, or of a map."""
    if dtype == torch.float32:
        block, keys, warps, stages = 32, 16, 8, 1
    elif not _operands_stay_in_shared_memory():
        block, keys, warps, stages = 64, 32, 4, 2
    elif width <= 64 and not window:
        block, keys, warps, stages = 128, 64, 8, 2
    else:
        block, keys, warps, stages = 64, 32, 4 if gpu_architecture() < 100 else 8, 2
    block = min(block, max(triton.next_power_of_2(queries), 16))
    return {"BLOCK": block, "KEYS": keys, "num_warps": warps, "num_stages": stages}


@tuned("BLOCK", "KEYS")
def key_tile(queries: int, window: bool, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile of keys that so many queries of a window, or of a map, read."""
    keys = 64
    if dtype == torch.float32:
        block, keys, warps, stages = 32, 32, 4, 1
    elif not _operands_stay_in_shared_memory():
        block, warps, stages = 64 if width <= 64 else 32, 8, 2
    elif gpu_architecture() < 100:
        block, warps, stages = 32 if window else 64, 4, 2
    else:  # Triton 3.6 cannot pipeline the loads of two tiles of channels there
        block, warps, stages = (64, 4, 2) if width <= 64 else (64, 8, 1)
    block = min(block, max(triton.next_power_of_2(queries), 16))
    return {"BLOCK": block, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def through_table(
    operands: Operands, across: bool, dbias: Tensor, parts: Tensor, dq: Tensor, dtable: Tensor | None
) -> None:
    """Add the gradient through the bias of rows or, ``across``, of columns to ``parts``, and compute the table's."""
    _, height, width, heads, channels = operands.q.shape
    table, size = (operands.rel_h, operands.rel_w)[across], operands.size[across]
    tile = table_tile(channels, max(operands.size), dtype=operands.q.dtype)
    blocks = operands.line_blocks(across, tile["BLOCK"])
    sizes = size, operands.size[0] if across else 0, height, width, sum(operands.size), heads
    constants = {"ACROSS": across, **operands.head_tile(), **tile}
    query_bias_gradient_kernel[(blocks,)](parts, dbias, table, dq, *sizes, **constants)
    if dtable is not None:
        per_program = triton.cdiv(blocks, 64)
        table_parts = parts.new_empty(triton.cdiv(blocks, per_program), *table.shape)
        table_gradient_kernel[table_parts.shape[0], triton.cdiv(table.shape[0], tile["BLOCK_K"])](
            operands.q, dbias, table_parts, operands.q.stride()[:4], blocks, per_program, *sizes, **constants
        )
        sum_parts(table_parts, dtable)


def relative_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, pad_key: Tensor, pad_value: Tensor,
    out: Tensor, stats: Tensor, window: int, scale: float, need_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_width(q)
    batch, height, width, heads, channels = q.shape
    dq, dk, dv, dpad_key, dpad_value = (x.new_empty(x.shape) for x in (q, k, v, pad_key, pad_value))
    drel_h, drel_w = (table.new_empty(table.shape if need_tables else (0,)) for table in (rel_h, rel_w))
    grads = dq, dk, dv, drel_h, drel_w, dpad_key, dpad_value
    if not q.numel():
        return tuple(x.zero_() for x in grads)
    operands = Operands.of(q, k, v, rel_h, rel_w, pad_key, pad_value, window)
    dout, out, stats = dout.contiguous(), out.contiguous(), stats.contiguous()
    of_head = operands.head_tile()
    products_dq = q.new_empty(q.shape, dtype=torch.float32)
    delta = products_dq.new_empty(batch, heads, height * width)
    with torch.cuda.device_of(q):
        bias = operands.bias()
        dbias = torch.empty_like(bias)
        inputs = dout, *operands[:3], bias, *operands[3:5]
        tile = query_tile(operands.queries, bool(window), channels, q.dtype)
        keys = operands.key_tile(tile.pop("KEYS"), 16)
        blocks = triton.cdiv(operands.queries, tile["BLOCK"])
        query_gradient_kernel[(batch * operands.windows * heads * blocks,)](
            *inputs, out, stats, products_dq, dbias, delta, *operands.strides(), *operands.sizes(), blocks, scale,
            **of_head, **keys, **tile,
        )  # fmt: skip
        tile = key_tile(operands.queries, bool(window), channels, q.dtype)
        keys = operands.key_tile(tile.pop("KEYS"), 16)
        blocks = triton.cdiv(operands.size[0], keys["ROWS"]) * triton.cdiv(operands.size[1], keys["COLUMNS"])
        parts = None, None
        if keys["FILLED"]:
            parts = delta.new_empty(2, operands.windows * blocks, batch, heads, channels)
        key_gradient_kernel[(batch * operands.windows * heads * blocks,)](
            *inputs, stats, delta, dk, dv, *parts, *operands.strides(), *operands.sizes(), blocks, batch, scale,
            **of_head, **keys, **tile,
        )  # fmt: skip
        for part, total in zip(parts, (dpad_key, dpad_value), strict=True):
            total.zero_() if part is None else sum_parts(part, total)
        # Both tables in turn: the rows' gradient of q is added in place, and the columns' makes dq of the sum.
        for across, into in ((False, products_dq), (True, dq)):
            through_table(operands, across, dbias, products_dq, into, (drel_h, drel_w)[across] if need_tables else None)
    return grads


LIBRARY.impl("relative_attention_backward.triton", relative_attention_backward, "CompositeExplicitAutograd")
