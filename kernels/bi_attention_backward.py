"""Triton implementation of fastcss::bi_attention_backward.

Let t be the bounded logits and P = exp(t − largest − log Σ) the weights of a side, 0 where its mask hides a token. dP
is dimage · v_text on the image side and v_image · dtext on the text side. Then

    dS = P_image (dP_image − δ_image) + P_text (dP_text − δ_text), 0 for a logit below the bound
    dq = scale · dS k,   dk = scale · dSᵀ q,   dv_text = P_imageᵀ dimage,   dv_image = P_text dtext

where δ_text = dtext · text, and δ_image = Σ P_image dP_image since the image side's output is not kept. All of it stays
the same when the two sides change places. So both use one kernel, rows against keys, that computes the gradients of its
rows: first for the image, whose programs find δ_image in a loop before, then for the text, whose keys are split among
programs that leave float32 parts, which are added up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .bi_attention import check_width, keys_of_split, readable
from .bi_attention_device import bounded, load_read, load_rows, place_of, products
from .class_centers import exp
from .multi_lora import precision
from .multi_lora_device import dot, store_tile
from .tuned import tuned


@triton.jit
def delta_kernel(
    out, dout, delta, R, heads,
    D: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta [B, heads, R] = out · dout for rows [B, R, heads, D]. It is summed in the same way as the gradients of the
    weights: the output of a row that reads only one key is that key's value, and then the two must be equal."""
    batch, head, _, block = place_of(R, heads, 1, BLOCK_R)
    width = heads * D
    row = block * BLOCK_R
    place = batch * R * width + tl.cast(head, tl.int64) * D
    x_tile = load_rows(out + place, row, R, width, D, BLOCK_R, BLOCK_D)
    y_tile = load_rows(dout + place, row, R, width, D, BLOCK_R, BLOCK_D)
    s = products(
        out + place, dout + place, x_tile, y_tile, row, row, R, R, width, width, D, CHUNK, PRECISION
    )  # fmt: skip
    rows = tl.arange(0, BLOCK_R)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], s, 0.0), 1)
    tl.store(delta + (batch * heads + head) * R + row + rows, own, mask=row + rows < R)


@triton.jit
def _add_deltas(
    x, dx_out, x_tile, dx_out_tile, y, v_y, top, log, mask, peak, bound, row, R, K, width,
    stride_xr, stride_yk, stride_wk, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum P dP of a row block over all keys."""
    delta = tl.zeros([x_tile.shape[0]], tl.float32)
    for key in range(0, K, BLOCK_K):
        y_tile = load_rows(y, key, K, stride_yk, D, BLOCK_K, BLOCK_D)
        s = products(x, y, x_tile, y_tile, row, key, R, K, stride_xr, stride_yk, D, CHUNK, PRECISION) * scale
        w_tile = load_rows(v_y, key, K, stride_wk, D, BLOCK_K, BLOCK_D)
        dp = products(
            dx_out, v_y, dx_out_tile, w_tile, row, key, R, K, width, stride_wk, D, CHUNK, PRECISION
        )  # fmt: skip
        p = exp(bounded(s, peak, bound) - top[:, None] - log[:, None])
        delta += tl.sum(tl.where(load_read(mask, key, K, BLOCK_K)[None, :], p * dp, 0.0), 1)
    return delta


@triton.jit(do_not_specialize=["batches"])
def gradient_kernel(
    x, v_x, dout_x, stats_x, delta_x, mask_x, y, v_y, dout_y, stats_y, delta_y, mask_y, floor, dx, dv,
    R, K, batches, heads, splits, split_keys,
    stride_xb, stride_xr, stride_xh, stride_vb, stride_vr, stride_vh,
    stride_yb, stride_yk, stride_yh, stride_wb, stride_wk, stride_wh, scale,
    FIND_DELTA: tl.constexpr, DX: tl.constexpr, DV: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx and dv [splits, B, R, heads, D] of the rows x and of their values, which keys y read.

    FIND_DELTA: delta_x [B, heads, R] is written, not read, and there is one split.
    """
    batch, head, split, block = place_of(R, heads, splits, BLOCK_R)
    head64 = tl.cast(head, tl.int64)
    width = heads * D
    row = block * BLOCK_R
    rows = row + tl.arange(0, BLOCK_R)
    first = split * split_keys
    last = min(first + split_keys, K)
    x += batch * stride_xb + head64 * stride_xh
    v_x += batch * stride_vb + head64 * stride_vh
    y += batch * stride_yb + head64 * stride_yh
    v_y += batch * stride_wb + head64 * stride_wh
    dout_x += batch * R * width + head64 * D
    dout_y += batch * K * width + head64 * D
    stats_x += (batch * heads + head) * R * 2
    delta_x += (batch * heads + head) * R
    stats_y += (batch * heads + head) * K * 2
    delta_y += (batch * heads + head) * K
    if mask_x is not None:
        mask_x += batch * R
    if mask_y is not None:
        mask_y += batch * K
    peak, bound = tl.load(floor + batch * 2), tl.load(floor + batch * 2 + 1)

    x_tile = load_rows(x, row, R, stride_xr, D, BLOCK_R, BLOCK_D)
    if DX or FIND_DELTA:
        dout_x_tile = load_rows(dout_x, row, R, width, D, BLOCK_R, BLOCK_D)
        own_top = tl.load(stats_x + rows * 2, mask=rows < R, other=0.0)
        own_log = tl.load(stats_x + rows * 2 + 1, mask=rows < R, other=0.0)
    if FIND_DELTA:
        own_delta = _add_deltas(
            x, dout_x, x_tile, dout_x_tile, y, v_y, own_top, own_log, mask_y, peak, bound, row, R, K, width,
            stride_xr, stride_yk, stride_wk, scale, D, CHUNK, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        tl.store(delta_x + rows, own_delta, mask=rows < R)
    elif DX:
        own_delta = tl.load(delta_x + rows, mask=rows < R, other=0.0)
    if DX:
        v_x_tile = load_rows(v_x, row, R, stride_vr, D, BLOCK_R, BLOCK_D)
    x_sum = tl.zeros([BLOCK_R, BLOCK_D if DX else 1], tl.float32)
    v_sum = tl.zeros([BLOCK_R, BLOCK_D if DV else 1], tl.float32)
    dtype: tl.constexpr = x_tile.dtype
    is_read = load_read(mask_x, row, R, BLOCK_R)[:, None]
    for key in range(first, last, BLOCK_K):
        keys = key + tl.arange(0, BLOCK_K)
        there = (keys < last)[None, :]
        y_tile = load_rows(y, key, K, stride_yk, D, BLOCK_K, BLOCK_D)
        s = products(x, y, x_tile, y_tile, row, key, R, K, stride_xr, stride_yk, D, CHUNK, PRECISION) * scale
        t = bounded(s, peak, bound)
        top = tl.load(stats_y + keys * 2, mask=keys < last, other=0.0)[None, :]
        log = tl.load(stats_y + keys * 2 + 1, mask=keys < last, other=0.0)[None, :]
        p = exp(t - top - log)
        dout_y_tile = load_rows(dout_y, key, K, width, D, BLOCK_K, BLOCK_D)
        if DX:
            w_tile = load_rows(v_y, key, K, stride_wk, D, BLOCK_K, BLOCK_D)
            dp = products(dout_x, v_y, dout_x_tile, w_tile, row, key, R, K, width, stride_wk, D, CHUNK, PRECISION)
            ds = exp(t - own_top[:, None] - own_log[:, None]) * (dp - own_delta[:, None])
            if mask_y is not None:
                ds = tl.where(load_read(mask_y, key, last, BLOCK_K)[None, :], ds, 0.0)
            dp = products(v_x, dout_y, v_x_tile, dout_y_tile, row, key, R, K, stride_vr, width, D, CHUNK, PRECISION)
            delta = tl.load(delta_y + keys, mask=keys < last, other=0.0)[None, :]
            g = p * (dp - delta)
            ds += g if mask_x is None else tl.where(is_read, g, 0.0)
            ds = tl.where(there & (s - peak >= bound), ds, 0.0)
            x_sum = dot(ds.to(dtype), y_tile, x_sum, PRECISION)
        if DV:
            # If all keys are masked the logarithm is −∞, and 0 times it is NaN, as the softmax is then.
            p = tl.where(there, tl.where(is_read, p, 0.0 * log), 0.0)
            v_sum = dot(p.to(dtype), dout_y_tile, v_sum, PRECISION)
    place = (tl.cast(split, tl.int64) * batches + batch) * R * width + head64 * D
    if DX:
        store_tile(dx + place, x_sum * scale, row, 0, R, D, width)
    if DV:
        store_tile(dv + place, v_sum, row, 0, R, D, width)


@triton.jit
def _add_parts(parts, out, size, splits, BLOCK: tl.constexpr):
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def add_parts_kernel(dx_parts, dv_parts, dx, dv, size, splits, BLOCK: tl.constexpr):
    """Add up dx and dv [size] from their parts [splits, size], in their order."""
    if tl.program_id(1) == 0:
        _add_parts(dx_parts, dx, size, splits, BLOCK)
    else:
        _add_parts(dv_parts, dv, size, splits, BLOCK)


def at_once(rows: int, keys: int, dtype: torch.dtype) -> bool:
    """Tell whether one launch computes all. Memory is the limit for few rows or keys. With many, several
    launches of one accumulator each leave registers for tiles that keep the tensor cores busy."""
    return min(rows, keys) <= 32 or dtype == torch.float32


@tuned("BLOCK_R", "BLOCK_K")
def gradient_tile(rows: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile for this many rows and keys."""
    block_d = max(triton.next_power_of_2(width), 16)
    if dtype == torch.float32:
        r, k, warps, stages, chunk = 16, 16, 8, 1, min(block_d, 32)
    else:
        r, k, warps, stages, chunk = 32 if at_once(rows, keys, dtype) else 64, 32, 8, 2, 0
    r = min(r, max(triton.next_power_of_2(rows), 16))
    return {
        "BLOCK_R": r, "BLOCK_K": k, "BLOCK_D": block_d, "CHUNK": chunk, "PRECISION": precision(dtype),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


class Side(NamedTuple):
    """Holds one side's tokens and what goes with them."""

    x: Tensor  # [B, R, heads, D]
    v: Tensor  # [B, R, heads, D], what the other side reads
    dout: Tensor  # [B, R, heads · D]
    stats: Tensor  # [B, heads, R, 2]
    delta: Tensor  # [B, heads, R]
    mask: Tensor | None  # [B, R], contiguous

    def strides(self) -> tuple[int, ...]:
        return *self.x.stride()[:3], *self.v.stride()[:3]


def side_gradients(own: Side, other: Side, floor: Tensor, scale: float, find_delta: bool) -> tuple[Tensor, Tensor]:
    """Compute dx and dv [B, R, heads, D] of the side ``own``."""
    (batch, rows, heads, width), keys = own.x.shape, other.x.shape[1]
    tile = gradient_tile(rows, keys, width, own.x.dtype)
    split_keys = keys if find_delta else keys_of_split(rows, keys, heads, tile)
    splits, blocks = triton.cdiv(keys, split_keys), triton.cdiv(rows, tile["BLOCK_R"])
    gradients = own.x.new_empty(own.x.shape), own.x.new_empty(own.x.shape)
    parts = gradients
    if splits > 1:
        parts = own.x.new_empty((2, splits, *own.x.shape), dtype=torch.float32)
    if at_once(rows, keys, own.x.dtype):
        launches = [(find_delta, True, True)]
    else:
        launches = [(True, False, False)] * find_delta + [(False, True, False), (False, False, True)]
    for delta, dx, dv in launches:
        gradient_kernel[(batch * heads * splits * blocks,)](
            *own, *other, floor, parts[0], parts[1], rows, keys, batch, heads, splits, split_keys,
            *own.strides(), *other.strides(), scale, FIND_DELTA=delta, DX=dx, DV=dv, D=width, **tile,
        )  # fmt: skip
    if splits > 1:
        size = own.x.numel()
        add_parts_kernel[triton.cdiv(size, 256), 2](*parts, *gradients, size, splits, BLOCK=256, num_warps=2)
    return gradients


def bi_attention_backward(
    dimage: Tensor, dtext: Tensor, q: Tensor, k: Tensor, v_image: Tensor, v_text: Tensor, text_mask: Tensor | None,
    image_mask: Tensor | None, text: Tensor, image_stats: Tensor, text_stats: Tensor, floor: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_width(q)
    if not (q.numel() and k.numel()):
        return tuple(x.new_zeros(x.shape) for x in (q, k, v_image, v_text))
    (batch, length, heads, width), pixels = k.shape, q.shape[1]
    q, k, v_image, v_text = readable(q, k, v_image, v_text)
    dimage, dtext, text, floor = (x.contiguous() for x in (dimage, dtext, text, floor))
    # float32 masks are as wide as a token's other numbers, so they are copied asynchronously too: fewer registers.
    text_mask, image_mask = (None if m is None else m.float().contiguous() for m in (text_mask, image_mask))
    image_delta, text_delta = (floor.new_empty(batch, heads, tokens) for tokens in (pixels, length))
    image_side = Side(q, v_image, dimage, image_stats.contiguous(), image_delta, image_mask)
    text_side = Side(k, v_text, dtext, text_stats.contiguous(), text_delta, text_mask)
    with torch.cuda.device_of(q):
        tile = gradient_tile(length, pixels, width, q.dtype) | {"BLOCK_R": 16}
        del tile["BLOCK_K"]
        delta_kernel[(batch * heads * triton.cdiv(length, 16),)](
            text, dtext, text_delta, length, heads, D=width, **tile
        )
        dq, dv_image = side_gradients(image_side, text_side, floor, scale, find_delta=True)
        dk, dv_text = side_gradients(text_side, image_side, floor, scale, find_delta=False)
    return dq, dk, dv_image, dv_text


LIBRARY.impl("bi_attention_backward.triton", bi_attention_backward, "CompositeExplicitAutograd")
