"""Computes gradients of windows larger than a tile, by blocks of queries, of keys, and of both for the bias.

The first kernel keeps for each query what restores its attention: the maximum of its scores, 1 / Σ exp(score −
maximum), and Σ P dP. Each kernel computes the scores and dP again; nothing of size [windows, window², window²] is
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .affinity_device import exp2
from .class_centers import LOG2_E, finite_or_zero
from .multi_lora_device import dot
from .window_attention import SIZES
from .window_attention_device import (
    exp_above,
    load_bias,
    load_filled,
    load_tokens,
    padding_slot,
    scores_of,
    store_padding_sum,
    store_tokens,
    tokens_at,
    window_at,
)


@triton.jit
def load_statistics(statistics, queries, number, head, windows, heads, COUNT: tl.constexpr):
    """Load (maximum, 1 / Σ exp, Σ P dP) of queries from [3, windows, heads, window²] float32."""
    step = tl.cast(windows, tl.int64) * heads * COUNT
    statistics += (tl.cast(number, tl.int64) * heads + head) * COUNT + tl.minimum(queries, COUNT - 1)
    total = tl.load(statistics + 2 * step, mask=queries < COUNT, other=0.0)  # dout is 0 there too, so their dS is 0
    return tl.load(statistics), tl.load(statistics + step), total


@triton.jit(do_not_specialize=SIZES)
def query_gradients_kernel(
    dout, q, k, v, bias, pad_key, pad_value, dq, statistics,
    dout_strides, q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, rows, columns, heads, shift, windows, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dq of a block of queries, and their ``statistics``."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    sizes = (H, W, rows, columns)
    head = tl.program_id(0) % heads
    queries = tl.program_id(0) // heads % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(0) // (heads * BLOCKS)
    sample, window = window_at(number, sizes, shift, WINDOW)
    place, in_map, there = tokens_at(queries, sample, head, window, sizes, WINDOW)
    q_tile = load_tokens(q, q_strides, place, in_map, D, BLOCK_D, WIDE)
    dout_tile = load_tokens(dout, dout_strides, place, in_map & there, D, BLOCK_D, WIDE)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(0, COUNT, BLOCK):
        keys = n + tl.arange(0, BLOCK)
        at, inside, is_key = tokens_at(keys, sample, head, window, sizes, WINDOW)
        k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        bias_tile = load_bias(bias, head, queries, keys, COUNT)
        scores = scores_of(q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW, PRECISION)
        before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
        base = finite_or_zero(largest) * LOG2_E
        kept, weights = exp2(before * LOG2_E - base), exp_above(scores, base)
        mass = mass * kept + tl.sum(weights, 1)
        total = total * kept + tl.sum(weights * dot(dout_tile, tl.trans(v_tile), zeros, PRECISION), 1)
    base, inverse = finite_or_zero(largest) * LOG2_E, 1.0 / mass
    total *= inverse
    step = tl.cast(windows, tl.int64) * heads * COUNT
    statistics += (tl.cast(number, tl.int64) * heads + head) * COUNT + queries
    tl.store(statistics, base, mask=there)
    tl.store(statistics + step, inverse, mask=there)
    tl.store(statistics + 2 * step, total, mask=there)
    dq_tile = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for n in range(0, COUNT, BLOCK):
        keys = n + tl.arange(0, BLOCK)
        at, inside, is_key = tokens_at(keys, sample, head, window, sizes, WINDOW)
        k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        bias_tile = load_bias(bias, head, queries, keys, COUNT)
        scores = scores_of(q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW, PRECISION)
        dweights = dot(dout_tile, tl.trans(v_tile), zeros, PRECISION) - total[:, None]
        dscores = exp_above(scores, base) * (inverse * scale)[:, None] * dweights
        dq_tile = dot(dscores.to(k_tile.dtype), k_tile, dq_tile, PRECISION)
    store_tokens(dq, dq_tile, place, in_map & there, sizes, heads, D, WIDE)


@triton.jit(do_not_specialize=[*SIZES, "batches"])
def key_gradients_kernel(
    dout, q, k, v, bias, pad_key, pad_value, dk, dv, key_parts, value_parts, statistics,
    dout_strides, q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, rows, columns, heads, shift, windows, batches, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    sizes = (H, W, rows, columns)
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % BLOCKS
    keys = block * BLOCK + tl.arange(0, BLOCK)
    number = tl.program_id(0) // (heads * BLOCKS)
    sample, window = window_at(number, sizes, shift, WINDOW)
    place, in_map, there = tokens_at(keys, sample, head, window, sizes, WINDOW)
    k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, place, in_map, there, D, BLOCK_D, WIDE)
    v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, place, in_map, there, D, BLOCK_D, WIDE)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    dk_tile = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for m in range(0, COUNT, BLOCK):
        queries = m + tl.arange(0, BLOCK)
        at, inside, is_query = tokens_at(queries, sample, head, window, sizes, WINDOW)
        q_tile = load_tokens(q, q_strides, at, inside, D, BLOCK_D, WIDE)
        dout_tile = load_tokens(dout, dout_strides, at, inside & is_query, D, BLOCK_D, WIDE)
        base, inverse, total = load_statistics(statistics, queries, number, head, windows, heads, COUNT)
        bias_tile = load_bias(bias, head, queries, keys, COUNT)
        scores = scores_of(q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW, PRECISION)
        weights = exp_above(scores, base) * inverse[:, None]
        dv_tile = dot(tl.trans(weights.to(q_tile.dtype)), dout_tile, dv_tile, PRECISION)
        dweights = dot(dout_tile, tl.trans(v_tile), zeros, PRECISION) - total[:, None]
        dscores = (weights * dweights * scale).to(q_tile.dtype)
        dk_tile = dot(tl.trans(dscores), q_tile, dk_tile, PRECISION)
    store_tokens(dk, dk_tile, place, in_map & there, sizes, heads, D, WIDE)
    store_tokens(dv, dv_tile, place, in_map & there, sizes, heads, D, WIDE)
    if key_parts is not None:  # noqa: SIM102  known to the compiler
        if (window[1] + WINDOW > H) | (window[2] + WINDOW > W):
            slot = padding_slot(window, sizes, WINDOW) * BLOCKS + block
            store_padding_sum(key_parts, dk_tile, there & ~in_map, slot, place, batches, heads, D)
            store_padding_sum(value_parts, dv_tile, there & ~in_map, slot, place, batches, heads, D)


@triton.jit(do_not_specialize=SIZES)
def bias_gradients_kernel(
    dout, q, k, v, bias, pad_key, pad_value, bias_parts, statistics,
    dout_strides, q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, rows, columns, heads, shift, windows, per_program, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum dS of a block of queries and keys over ``per_program`` windows: [parts, heads, window², window²]."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    sizes = (H, W, rows, columns)
    head = tl.program_id(0) % heads
    queries = tl.program_id(0) // heads % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    keys = tl.program_id(0) // (heads * BLOCKS) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // (heads * BLOCKS * BLOCKS)
    bias_tile = load_bias(bias, head, queries, keys, COUNT)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for number in tl.range(part * per_program, min((part + 1) * per_program, windows), disable_licm=True):
        sample, window = window_at(number, sizes, shift, WINDOW)
        place, in_map, there = tokens_at(queries, sample, head, window, sizes, WINDOW)
        q_tile = load_tokens(q, q_strides, place, in_map, D, BLOCK_D, WIDE)
        dout_tile = load_tokens(dout, dout_strides, place, in_map & there, D, BLOCK_D, WIDE)
        at, inside, is_key = tokens_at(keys, sample, head, window, sizes, WINDOW)
        k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
        base, inverse, total = load_statistics(statistics, queries, number, head, windows, heads, COUNT)
        scores = scores_of(q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW, PRECISION)
        dweights = dot(dout_tile, tl.trans(v_tile), zeros, PRECISION) - total[:, None]
        bias_sum += exp_above(scores, base) * inverse[:, None] * dweights
    bias_parts += (tl.cast(part, tl.int64) * heads + head) * (COUNT * COUNT)
    mask = (queries < COUNT)[:, None] & (keys < COUNT)[None, :]
    tl.store(bias_parts + queries[:, None] * COUNT + keys[None, :], bias_sum, mask=mask)


def block_gradients(
    pointers: tuple[Tensor | None, ...], strides: tuple, scalars: tuple, constants: dict, blocks: int, parts: int
) -> None:
    """Compute the gradients; the arguments are those of window_gradients_kernel, sorted."""
    *inputs, dq, dk, dv, bias_parts, key_parts, value_parts = pointers
    *sizes, heads, shift, windows, per_program, batches, scale = scalars
    common = *sizes, heads, shift, windows
    statistics = dq.new_empty(3, windows, heads, constants["WINDOW"] ** 2, dtype=torch.float32)
    warps, stages = (8, 1) if dq.dtype == torch.float32 else (4, 2)
    launch = {**constants, "num_warps": warps, "num_stages": stages}
    programs = windows * blocks * heads
    query_gradients_kernel[(programs,)](*inputs, dq, statistics, *strides, *common, scale, **launch)
    key_gradients_kernel[(programs,)](
        *inputs, dk, dv, key_parts, value_parts, statistics, *strides, *common, batches, scale, **launch
    )
    if bias_parts is not None:
        bias_gradients_kernel[(parts * blocks**2 * heads,)](
            *inputs, bias_parts, statistics, *strides, *common, per_program, scale, **launch
        )
