"""Triton implementation of fastcss::select_tokens_backward.

With t̂ and ĉ of length one, cos = t̂ · ĉ and g_c = dpresence_c / count_c, over the tokens that survive for class c

    dt = dselected where the token was copied to + g_c (ĉ − cos t̂) / ‖t‖,   dc = g_c (Σ t̂ − ĉ Σ cos) / ‖c‖

and 0 for the others. Four launches: the place of each token among those of its class, which is a running count; the
tokens' gradients; Σ t̂ over splits of the tokens, as a product with the one-hot classes; and the sum of the splits in
their order. A row shorter than 1e-12 is divided by that constant, so its own direction is not taken out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_tiles import round_up
from .multi_lora import rank_block
from .multi_lora_device import dot, load_tile, store_tile
from .select_tokens import SMALLEST, clamped_root
from .tuned import tuned

MAX_SPLITS = 32


@triton.jit
def token_places_kernel(best, places, C, N, BLOCK_N: tl.constexpr):
    """places [B, N] of one class: how many of its tokens are before each of them."""
    batch, c = tl.cast(tl.program_id(0) // C, tl.int64), tl.program_id(0) % C
    offsets = tl.arange(0, BLOCK_N)
    before = 0
    for n in range(0, N, BLOCK_N):
        rows = n + offsets
        of_class = tl.load(best + batch * N + rows, mask=rows < N, other=-1) == c
        upto = before + tl.cumsum(of_class.to(tl.int32), 0)
        tl.store(places + batch * N + rows, upto - 1, mask=of_class)
        before = tl.max(upto, 0)


@triton.jit
def _load_rows(base, rows, d, there, D, stride_row, stride_d, BLOCK_D: tl.constexpr):
    """float32 [rows, BLOCK_D] of the rows listed, 0 where they are not there."""
    columns = d + tl.arange(0, BLOCK_D)
    offset = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offset, mask=there[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def tokens_gradient_kernel(
    dselected, dpresence, tokens, classes, counts, best, cosine, places, dtokens, lengths,
    N, C, D, length, stride_tb, stride_tn, stride_td, stride_cb, stride_cc, stride_cd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dtokens [B, N, D], and the lengths ‖t‖ [B, N] of the tokens that survive."""
    blocks = tl.cdiv(N, BLOCK_N)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens += batch * stride_tb
    classes += batch * stride_cb
    c = tl.load(best + batch * N + rows, mask=rows < N, other=-1)
    survives = c >= 0
    cos = tl.load(cosine + batch * N + rows, mask=survives, other=0.0)
    place = tl.load(places + batch * N + rows, mask=survives, other=0).to(tl.int64)
    per_class = batch * C + c
    g = tl.load(dpresence + per_class, mask=survives, other=0.0).to(tl.float32)
    g /= tl.load(counts + per_class, mask=survives, other=1).to(tl.float32)
    token_squares = tl.zeros([BLOCK_N], tl.float32)
    class_squares = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        t_rows = _load_rows(tokens, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        c_rows = _load_rows(classes, c, d, survives, D, stride_cc, stride_cd, BLOCK_D)
        token_squares += tl.sum(t_rows * t_rows, 1)
        class_squares += tl.sum(c_rows * c_rows, 1)
    token_length, class_length = clamped_root(token_squares), clamped_root(class_squares)
    tl.store(lengths + batch * N + rows, token_length, mask=survives)
    to_class = g / token_length / class_length
    to_token = tl.where(token_length > SMALLEST, g * cos / token_length / token_length, 0.0)
    for d in range(0, D, BLOCK_D):
        t_rows = _load_rows(tokens, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        c_rows = _load_rows(classes, c, d, survives, D, stride_cc, stride_cd, BLOCK_D)
        slot = place[:, None] * D + (d + tl.arange(0, BLOCK_D))[None, :]
        copied = survives[:, None] & (slot < length) & (d + tl.arange(0, BLOCK_D) < D)[None, :]
        dt = tl.load(dselected + per_class[:, None] * length + slot, mask=copied, other=0.0).to(tl.float32)
        dt += tl.where(survives[:, None], to_class[:, None] * c_rows - to_token[:, None] * t_rows, 0.0)
        store_tile(dtokens + batch * N * D, dt, tl.program_id(0) % blocks * BLOCK_N, d, N, D, D)


@triton.jit(do_not_specialize=["batches"])
def class_sums_kernel(
    tokens, best, cosine, lengths, partial, cosine_sums,
    N, C, D, batches, splits, per_split, stride_tb, stride_tn, stride_td,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Over a split of the tokens Σ t̂ [splits, B, C, D] and Σ cos [splits, B, C] of each class."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    c = tl.program_id(0) % blocks_c * BLOCK_C
    d = tl.program_id(0) // blocks_c % blocks_d * BLOCK_D
    split = tl.program_id(0) // (blocks_c * blocks_d) % splits
    batch = tl.program_id(0) // (blocks_c * blocks_d) // splits
    batch64 = tl.cast(batch, tl.int64)
    dtype: tl.constexpr = tokens.dtype.element_ty
    columns = c + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    cosines = tl.zeros([BLOCK_C], tl.float32)
    last = min((split + 1) * per_split, N)
    for n in range(split * per_split, last, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        chosen = tl.load(best + batch64 * N + rows, mask=rows < last, other=-1)
        survives = chosen >= 0
        cos = tl.load(cosine + batch64 * N + rows, mask=survives, other=0.0)
        token_length = tl.load(lengths + batch64 * N + rows, mask=survives, other=1.0)
        t_rows = _load_rows(tokens + batch64 * stride_tb, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        units = t_rows / token_length[:, None]
        is_class = columns[:, None] == chosen[None, :]
        one_hot = tl.where(is_class, 1.0, 0.0).to(dtype)
        rounded = units.to(dtype)
        acc = dot(one_hot, rounded, acc, "ieee")
        if dtype != tl.float32:  # what was rounded off, so that the sum is as good as one in float32
            acc = dot(one_hot, (units - rounded.to(tl.float32)).to(dtype), acc, "ieee")
        cosines += tl.sum(tl.where(is_class, cos[None, :], 0.0), 1)
    part = (tl.cast(split, tl.int64) * batches + batch) * C
    store_tile(partial + part * D, acc, c, d, C, D, D)
    if d == 0:
        tl.store(cosine_sums + part + columns, cosines, mask=columns < C)


@triton.jit(do_not_specialize=["batches"])
def classes_gradient_kernel(
    dpresence, classes, counts, partial, cosine_sums, dclasses,
    C, D, batches, splits, stride_cb, stride_cc, stride_cd, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dclasses [B, C, D] from the splits."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C
    batch = tl.program_id(0) // blocks_c
    column = tl.program_id(1) * BLOCK_D
    batch64 = tl.cast(batch, tl.int64)
    classes += batch64 * stride_cb
    rows = c + tl.arange(0, BLOCK_C)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for d in range(0, D, BLOCK_D):
        c_rows = load_tile(classes, c, d, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D).to(tl.float32)
        squares += tl.sum(c_rows * c_rows, 1)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    cosines = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        part = (tl.cast(split, tl.int64) * batches + batch) * C
        total += load_tile(partial + part * D, c, column, C, D, D, 1, BLOCK_C, BLOCK_D)
        cosines += tl.load(cosine_sums + part + rows, mask=rows < C, other=0.0)
    count = tl.load(counts + batch64 * C + rows, mask=rows < C, other=0)
    g = tl.load(dpresence + batch64 * C + rows, mask=rows < C, other=0.0).to(tl.float32)
    class_length = clamped_root(squares)
    pull = tl.where(class_length > SMALLEST, cosines / class_length, 0.0)
    c_rows = load_tile(classes, c, column, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D).to(tl.float32)
    factor = g / tl.maximum(count, 1).to(tl.float32) / class_length
    dc = tl.where((count > 0)[:, None], factor[:, None] * (total - pull[:, None] * c_rows), 0.0)
    store_tile(dclasses + batch64 * C * D, dc, c, column, C, D, D)


@tuned("BLOCK_N", "BLOCK_C", "BLOCK_D")
def sums_tile(classes: int, dtype: torch.dtype) -> dict[str, int]:
    largest = 32 if dtype == torch.float32 else 64
    return {"BLOCK_N": 32, "BLOCK_C": rank_block(classes, largest), "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}


def select_tokens_backward(
    dselected: Tensor,
    dpresence: Tensor,
    tokens: Tensor,
    classes: Tensor,
    counts: Tensor,
    best: Tensor,
    cosine: Tensor,
) -> tuple[Tensor, Tensor]:
    (batches, count, depth), class_count, length = tokens.shape, classes.shape[1], dselected.shape[2]
    dtokens, dclasses = tokens.new_empty(tokens.shape), classes.new_empty(classes.shape)
    dselected, dpresence, counts, best, cosine = (
        x.contiguous() for x in (dselected, dpresence, counts, best, cosine)
    )  # fmt: skip
    places, lengths = torch.empty_like(best), torch.empty_like(cosine)
    tile = sums_tile(class_count, tokens.dtype)
    per_split = round_up(max(triton.cdiv(count, MAX_SPLITS), 1), tile["BLOCK_N"])
    splits = triton.cdiv(count, per_split)
    partial = tokens.new_empty((splits, batches, class_count, depth), dtype=torch.float32)
    cosine_sums = tokens.new_empty((splits, batches, class_count), dtype=torch.float32)
    blocks = triton.cdiv(class_count, tile["BLOCK_C"]) * triton.cdiv(depth, tile["BLOCK_D"])
    with torch.cuda.device_of(tokens):
        if batches * count:
            token_places_kernel[(batches * class_count,)](best, places, class_count, count, BLOCK_N=2048, num_warps=8)
            tokens_gradient_kernel[(batches * triton.cdiv(count, 32),)](
                dselected, dpresence, tokens, classes, counts, best, cosine, places, dtokens, lengths,
                count, class_count, depth, length, *tokens.stride(), *classes.stride(),
                BLOCK_N=32, BLOCK_D=128, num_warps=8,
            )  # fmt: skip
            class_sums_kernel[(batches * splits * blocks,)](
                tokens, best, cosine, lengths, partial, cosine_sums,
                count, class_count, depth, batches, splits, per_split, *tokens.stride(), **tile,
            )  # fmt: skip
        if batches:
            classes_gradient_kernel[batches * triton.cdiv(class_count, 8), triton.cdiv(depth, 64)](
                dpresence, classes, counts, partial, cosine_sums, dclasses,
                class_count, depth, batches, splits, *classes.stride(), BLOCK_C=8, BLOCK_D=64, num_warps=4,
            )  # fmt: skip
    return dtokens, dclasses


LIBRARY.impl("select_tokens_backward.triton", select_tokens_backward, "CompositeExplicitAutograd")
