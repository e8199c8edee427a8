"""Triton implementation of fastcss::window_attention_backward.

Let P be the attention, dP = dout vᵀ, and dS = P (dP − Σ P dP of the row):

    dv = Pᵀ dout,   dq = scale dS k,   dk = scale dSᵀ q,   dbias = Σ dS over samples and windows

A token is in one window only, so its gradients are stored, not added. A window of up to 64 tokens is one tile: P and dP
stay in registers, and each program adds up the dS of its windows there. Programs leave these sums in float32, and so do
windows at the edges those of their padding tokens' dk and dv; another kernel adds them in a fixed order. See
window_attention_blocks for larger windows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .class_centers import LOG2_E, finite_or_zero
from .multi_lora import precision
from .multi_lora_device import dot
from .window_attention import SIZES, Operands, adjacent, block_sizes, windows_of_program
from .window_attention_blocks import block_gradients
from .window_attention_device import (
    exp_above,
    load_bias,
    load_filled,
    load_tokens,
    padding_slot,
    scores_of,
    store_padding_sum,
    store_tokens,
    sum_parts_kernel,
    tokens_at,
    window_at,
)

# Programs on a multiprocessor: a sum of dS takes a third of the registers.
WITH_BIAS, WITHOUT_BIAS = 2, 3
REGISTERS = 65536 // (WITHOUT_BIAS * 128) // 8 * 8


@triton.jit(do_not_specialize=[*SIZES, "batches"])
def window_gradients_kernel(
    dout, q, k, v, bias, pad_key, pad_value, dq, dk, dv, bias_parts, key_parts, value_parts,
    dout_strides, q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, rows, columns, heads, shift, windows, per_program, batches, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = WINDOW * WINDOW
    dtype: tl.constexpr = q.dtype.element_ty
    sizes = (H, W, rows, columns)
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    first = part * per_program
    tokens = tl.arange(0, BLOCK)
    bias_tile = load_bias(bias, head, tokens, tokens, COUNT)
    bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    no_channels = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for number in tl.range(first, min(first + per_program, windows), disable_licm=True):
        sample, window = window_at(number, sizes, shift, WINDOW)
        place, in_map, there = tokens_at(tokens, sample, head, window, sizes, WINDOW)
        q_tile = load_tokens(q, q_strides, place, in_map, D, BLOCK_D, WIDE)
        k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, place, in_map, there, D, BLOCK_D, WIDE)
        v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, place, in_map, there, D, BLOCK_D, WIDE)
        dout_tile = load_tokens(dout, dout_strides, place, in_map & there, D, BLOCK_D, WIDE)
        scores = scores_of(q_tile, k_tile, bias_tile, tokens, tokens, window, sizes, scale, WINDOW, PRECISION)
        weights = exp_above(scores, finite_or_zero(tl.max(scores, 1)) * LOG2_E)
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        dweights = dot(dout_tile, tl.trans(v_tile), zeros, PRECISION)
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        if bias_parts is not None:
            bias_sum += dscores
        at_edge = (window[1] + WINDOW > H) | (window[2] + WINDOW > W)
        dv_tile = dot(tl.trans(weights.to(dtype)), dout_tile, no_channels, PRECISION)
        store_tokens(dv, dv_tile, place, in_map & there, sizes, heads, D, WIDE)
        if value_parts is not None and at_edge:
            store_padding_sum(
                value_parts, dv_tile, there & ~in_map, padding_slot(window, sizes, WINDOW), place, batches, heads, D
            )
        dscores = (dscores * scale).to(dtype)
        dk_tile = dot(tl.trans(dscores), q_tile, no_channels, PRECISION)
        store_tokens(dk, dk_tile, place, in_map & there, sizes, heads, D, WIDE)
        if key_parts is not None and at_edge:
            store_padding_sum(
                key_parts, dk_tile, there & ~in_map, padding_slot(window, sizes, WINDOW), place, batches, heads, D
            )
        dq_tile = dot(dscores, k_tile, no_channels, PRECISION)
        store_tokens(dq, dq_tile, place, in_map & there, sizes, heads, D, WIDE)
    if bias_parts is not None:
        bias_parts += (tl.cast(part, tl.int64) * heads + head) * (COUNT * COUNT)
        there = tokens < COUNT
        tl.store(bias_parts + tokens[:, None] * COUNT + tokens[None, :], bias_sum, mask=there[:, None] & there[None, :])


def sum_parts(parts: Tensor, total: Tensor) -> None:
    sum_parts_kernel[(triton.cdiv(total.numel(), 64),)](
        parts, total, parts.shape[0], total.numel(), BLOCK_P=32, BLOCK_N=64, num_warps=4
    )


def window_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad_key: Tensor, pad_value: Tensor,
    window: int, shift: int, scale: float, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, height, width, heads, channels = q.shape
    dq, dk, dv, dpad_key, dpad_value = (x.new_empty(x.shape) for x in (q, k, v, pad_key, pad_value))
    dbias = bias.new_empty(bias.shape if need_bias else (0,))
    grads = dq, dk, dv, dbias, dpad_key, dpad_value
    if not q.numel():
        return tuple(x.zero_() for x in grads)
    operands, dout = Operands.of(q, k, v, bias, pad_key, pad_value), adjacent(dout.reshape(q.shape))
    tile = block_sizes(window, channels, q.dtype)
    blocks, windows, sizes = triton.cdiv(window**2, tile["BLOCK"]), operands.windows(window), operands.sizes(window)
    per_program = windows_of_program(windows, heads * blocks**2, WITH_BIAS if need_bias else WITHOUT_BIAS)
    parts = triton.cdiv(windows, per_program)
    bias_parts = q.new_empty(parts, *bias.shape, dtype=torch.float32) if need_bias else None
    key_parts = value_parts = None
    if height % window or width % window:
        slots = 2 * (sizes[2] + sizes[3]) * blocks, *pad_key.shape
        key_parts, value_parts = (q.new_zeros(slots, dtype=torch.float32) for _ in range(2))
    pointers = dout, *operands, dq, dk, dv, bias_parts, key_parts, value_parts
    scalars = *sizes, shift, windows, per_program, batch, scale
    constants = {"WINDOW": window, "D": channels, "PRECISION": precision(q.dtype), "WIDE": operands.wide(dout), **tile}
    exact = q.dtype == torch.float32
    registers = None if need_bias or exact or tile["BLOCK_D"] > 32 else REGISTERS
    with torch.cuda.device_of(q):
        if blocks == 1:
            window_gradients_kernel[(parts * heads,)](
                *pointers, dout.stride()[:4], *operands.strides(), *scalars, **constants,
                num_warps=8 if exact else 4, num_stages=1, maxnreg=registers,
            )  # fmt: skip
        else:
            block_gradients(pointers, (dout.stride()[:4], *operands.strides()), scalars, constants, blocks, parts)
        if need_bias:
            sum_parts(bias_parts, dbias)
        for padding_parts, dpad in ((key_parts, dpad_key), (value_parts, dpad_value)):
            if padding_parts is None:
                dpad.zero_()
            else:
                sum_parts(padding_parts, dpad)
    return grads


LIBRARY.impl("window_attention_backward.triton", window_attention_backward, "CompositeExplicitAutograd")
