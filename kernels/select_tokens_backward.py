"""Triton implementation of fastcss::select_tokens_backward.

Let t̂ and ĉ be the unit rows, and g = dpresence / n for a class c that averages n tokens:

    u = Σ g ĉ over the classes that average a token,    v = Σ t̂ over the tokens of a class
    dt = dselected of the token's copy + (u − (u · t̂) t̂) / ‖t‖,    dc = g (v − (v · ĉ) ĉ) / ‖c‖

and 0 for tokens without a class. Four launches find the place of each token among those of its best class, which is a
running count, and g / ‖c‖; the tokens' gradients; v over splits of the tokens; and the sum of the splits in their
order. Sums over pairs are products with a matrix of zeros and ones. A row shorter than 1e-12 is divided by that
constant, so its own direction is not taken out.
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
def token_places_kernel(
    dpresence, classes, support, best, places, slopes,
    C, N, D, stride_cb, stride_cc, stride_cd, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write places [B, N] of one class, how many of its tokens are before each of them; and slopes [B, C], g / ‖c‖."""
    batch, c = tl.cast(tl.program_id(0) // C, tl.int64), tl.program_id(0) % C
    offsets = tl.arange(0, BLOCK_N)
    before = 0
    for n in range(0, N, BLOCK_N):
        rows = n + offsets
        of_class = tl.load(best + batch * N + rows, mask=rows < N, other=-1) == c
        upto = before + tl.cumsum(of_class.to(tl.int32), 0)
        tl.store(places + batch * N + rows, upto - 1, mask=of_class)
        before = tl.max(upto, 0)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_N):
        channels = d + offsets
        place = batch * stride_cb + tl.cast(c, tl.int64) * stride_cc + channels.to(tl.int64) * stride_cd
        x = tl.load(classes + place, mask=channels < D, other=0.0).to(tl.float32)
        squares += x * x
    number = tl.load(support + batch * C + c)
    slope = tl.load(dpresence + batch * C + c).to(tl.float32) / tl.maximum(number, 1).to(tl.float32)
    slope /= clamped_root(tl.sum(squares, 0))
    tl.store(slopes + batch * C + c, tl.where(number > 0, slope, 0.0))


@triton.jit
def _pairs(chosen, above, rows, columns, there, C, BEST_ONLY: tl.constexpr):
    """Tell whether each of the classes ``columns`` averages each of the tokens ``rows``, whose best class is
    ``chosen``."""
    if BEST_ONLY:
        return chosen[:, None] == columns[None, :]
    place = rows.to(tl.int64)[:, None] * tl.cdiv(C, 32) + (columns // 32)[None, :]
    words = tl.load(above + place, mask=there[:, None] & (columns < C)[None, :], other=0)
    return (words >> (columns % 32)[None, :]) & 1 != 0


@triton.jit
def _add_masked(mask, rows, acc, EXACT: tl.constexpr):
    """Compute acc + mask · rows by products in bfloat16, which has the range of float32. A second product takes what
    the first leaves of the rows, and a third what the second leaves if it must be as EXACT as float32."""
    ones = tl.where(mask, 1.0, 0.0).to(tl.bfloat16)
    first = rows.to(tl.bfloat16)
    rest = rows - first.to(tl.float32)
    acc = dot(ones, first, acc, "ieee")
    second = rest.to(tl.bfloat16)
    acc = dot(ones, second, acc, "ieee")
    if EXACT:
        acc = dot(ones, (rest - second.to(tl.float32)).to(tl.bfloat16), acc, "ieee")
    return acc


@triton.jit
def _load_rows(base, rows, d, there, D, stride_row, stride_d, BLOCK_D: tl.constexpr):
    """Load the listed rows as float32 [rows, BLOCK_D], 0 for those that do not exist."""
    columns = d + tl.arange(0, BLOCK_D)
    offset = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offset, mask=there[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _pull(
    classes, slopes, above, chosen, rows, there, d, C, D, stride_cc, stride_cd,
    BEST_ONLY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute channels d … of u for the tokens ``rows``."""
    acc = tl.zeros([rows.shape[0], BLOCK_D], tl.float32)
    for c in range(0, C, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        slope = tl.load(slopes + columns, mask=columns < C, other=0.0)
        pulls = load_tile(classes, c, d, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D).to(tl.float32) * slope[:, None]
        mask = _pairs(chosen, above, rows, columns, there, C, BEST_ONLY)
        acc = _add_masked(
            mask, tl.where((slope != 0.0)[:, None], pulls, 0.0), acc, classes.dtype.element_ty == tl.float32
        )
    return acc


@triton.jit
def tokens_gradient_kernel(
    dselected, tokens, classes, best, above, places, slopes, dtokens, lengths,
    N, C, D, length, stride_tb, stride_tn, stride_td, stride_cb, stride_cc, stride_cd,
    BEST_ONLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dtokens [B, N, D], and the lengths ‖t‖ [B, N] of the tokens that survive."""
    blocks = tl.cdiv(N, BLOCK_N)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N
    rows = n + tl.arange(0, BLOCK_N)
    tokens += batch * stride_tb
    classes += batch * stride_cb
    slopes += batch * C
    above += batch * N * tl.cdiv(C, 32)
    chosen = tl.load(best + batch * N + rows, mask=rows < N, other=-1)
    survives = chosen >= 0
    place = tl.load(places + batch * N + rows, mask=survives, other=0).to(tl.int64)
    squares = tl.zeros([BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        t_rows = _load_rows(tokens, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        u = _pull(
            classes, slopes, above, chosen, rows, survives, d, C, D, stride_cc, stride_cd, BEST_ONLY, BLOCK_C, BLOCK_D
        )  # fmt: skip
        squares += tl.sum(t_rows * t_rows, 1)
        along += tl.sum(t_rows * u, 1)
    token_length = clamped_root(squares)
    tl.store(lengths + batch * N + rows, token_length, mask=survives)
    along = tl.where(token_length > SMALLEST, along / token_length / token_length, 0.0)
    per_class = (batch * C + chosen) * length
    for d in range(0, D, BLOCK_D):
        t_rows = _load_rows(tokens, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        u = _pull(
            classes, slopes, above, chosen, rows, survives, d, C, D, stride_cc, stride_cd, BEST_ONLY, BLOCK_C, BLOCK_D
        )  # fmt: skip
        slot = place[:, None] * D + (d + tl.arange(0, BLOCK_D))[None, :]
        copied = survives[:, None] & (slot < length) & (d + tl.arange(0, BLOCK_D) < D)[None, :]
        dt = tl.load(dselected + per_class[:, None] + slot, mask=copied, other=0.0).to(tl.float32)
        dt += tl.where(survives[:, None], (u - along[:, None] * t_rows) / token_length[:, None], 0.0)
        store_tile(dtokens + batch * N * D, dt, n, d, N, D, D)


@triton.jit(do_not_specialize=["batches"])
def class_sums_kernel(
    tokens, best, above, lengths, partial,
    N, C, D, batches, splits, per_split, stride_tb, stride_tn, stride_td,
    BEST_ONLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum v over a split of the tokens, [splits, B, C, D]."""
    blocks_c, blocks_d = tl.cdiv(C, BLOCK_C), tl.cdiv(D, BLOCK_D)
    c = tl.program_id(0) % blocks_c * BLOCK_C
    d = tl.program_id(0) // blocks_c % blocks_d * BLOCK_D
    split = tl.program_id(0) // (blocks_c * blocks_d) % splits
    batch = tl.program_id(0) // (blocks_c * blocks_d) // splits
    batch64 = tl.cast(batch, tl.int64)
    above += batch64 * N * tl.cdiv(C, 32)
    columns = c + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    last = min((split + 1) * per_split, N)
    for n in range(split * per_split, last, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        chosen = tl.load(best + batch64 * N + rows, mask=rows < last, other=-1)
        survives = chosen >= 0
        token_length = tl.load(lengths + batch64 * N + rows, mask=survives, other=1.0)
        t_rows = _load_rows(tokens + batch64 * stride_tb, rows, d, survives, D, stride_tn, stride_td, BLOCK_D)
        mask = _pairs(chosen, above, rows, columns, survives, C, BEST_ONLY)
        exact: tl.constexpr = tokens.dtype.element_ty == tl.float32
        acc = _add_masked(tl.trans(mask), t_rows / token_length[:, None], acc, exact)
    part = (tl.cast(split, tl.int64) * batches + batch) * C
    store_tile(partial + part * D, acc, c, d, C, D, D)


@triton.jit
def _sum_splits(partial, batch, batches, splits, c, d, C, D, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for split in range(splits):
        part = (tl.cast(split, tl.int64) * batches + batch) * C
        total += load_tile(partial + part * D, c, d, C, D, D, 1, BLOCK_C, BLOCK_D)
    return total


@triton.jit(do_not_specialize=["batches"])
def classes_gradient_kernel(
    classes, slopes, partial, dclasses,
    C, D, batches, splits, stride_cb, stride_cc, stride_cd, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dclasses [B, C, D] from the splits."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C
    batch = tl.program_id(0) // blocks_c
    batch64 = tl.cast(batch, tl.int64)
    classes += batch64 * stride_cb
    rows = c + tl.arange(0, BLOCK_C)
    squares = tl.zeros([BLOCK_C], tl.float32)
    along = tl.zeros([BLOCK_C], tl.float32)
    for d in range(0, D, BLOCK_D):
        c_rows = load_tile(classes, c, d, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D).to(tl.float32)
        squares += tl.sum(c_rows * c_rows, 1)
        along += tl.sum(c_rows * _sum_splits(partial, batch, batches, splits, c, d, C, D, BLOCK_C, BLOCK_D), 1)
    class_length = clamped_root(squares)
    along = tl.where(class_length > SMALLEST, along / class_length / class_length, 0.0)
    slope = tl.load(slopes + batch64 * C + rows, mask=rows < C, other=0.0)  # 0 if the class averages no token
    for d in range(0, D, BLOCK_D):
        c_rows = load_tile(classes, c, d, C, D, stride_cc, stride_cd, BLOCK_C, BLOCK_D).to(tl.float32)
        total = _sum_splits(partial, batch, batches, splits, c, d, C, D, BLOCK_C, BLOCK_D)
        dc = tl.where((slope != 0.0)[:, None], slope[:, None] * (total - along[:, None] * c_rows), 0.0)
        store_tile(dclasses + batch64 * C * D, dc, c, d, C, D, D)


@tuned("BLOCK_N", "BLOCK_C", "BLOCK_D")
def sums_tile(classes: int, dtype: torch.dtype) -> dict[str, int]:
    largest = 32 if dtype == torch.float32 else 64
    return {"BLOCK_N": 32, "BLOCK_C": rank_block(classes, largest), "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}


def select_tokens_backward(
    dselected: Tensor,
    dpresence: Tensor,
    tokens: Tensor,
    classes: Tensor,
    support: Tensor,
    best: Tensor,
    above: Tensor,
) -> tuple[Tensor, Tensor]:
    (batches, count, depth), class_count, length = tokens.shape, classes.shape[1], dselected.shape[2]
    dtokens, dclasses = tokens.new_empty(tokens.shape), classes.new_empty(classes.shape)
    dselected, dpresence, support, best, above = (
        x.contiguous() for x in (dselected, dpresence, support, best, above)
    )  # fmt: skip
    best_only = above.shape[2] == 0
    places, lengths = torch.empty_like(best), torch.empty_like(best, dtype=torch.float32)
    slopes = torch.empty_like(support, dtype=torch.float32)
    tile = sums_tile(class_count, tokens.dtype)
    per_split = round_up(max(triton.cdiv(count, MAX_SPLITS), 1), tile["BLOCK_N"])
    splits = triton.cdiv(count, per_split)
    partial = tokens.new_empty((splits, batches, class_count, depth), dtype=torch.float32)
    blocks = triton.cdiv(class_count, tile["BLOCK_C"]) * triton.cdiv(depth, tile["BLOCK_D"])
    with torch.cuda.device_of(tokens):
        if batches:
            token_places_kernel[(batches * class_count,)](
                dpresence, classes, support, best, places, slopes,
                class_count, count, depth, *classes.stride(), BLOCK_N=2048, num_warps=8,
            )  # fmt: skip
        if batches * count:
            tokens_gradient_kernel[(batches * triton.cdiv(count, 32),)](
                dselected, tokens, classes, best, above, places, slopes, dtokens, lengths,
                count, class_count, depth, length, *tokens.stride(), *classes.stride(),
                BEST_ONLY=best_only, BLOCK_N=32, BLOCK_C=rank_block(class_count, 32), BLOCK_D=64, num_warps=4,
            )  # fmt: skip
            class_sums_kernel[(batches * splits * blocks,)](
                tokens, best, above, lengths, partial,
                count, class_count, depth, batches, splits, per_split, *tokens.stride(), BEST_ONLY=best_only, **tile,
            )  # fmt: skip
        if batches:
            classes_gradient_kernel[(batches * triton.cdiv(class_count, 8),)](
                classes, slopes, partial, dclasses,
                class_count, depth, batches, splits, *classes.stride(), BLOCK_C=8, BLOCK_D=64, num_warps=4,
            )  # fmt: skip
    return dtokens, dclasses


LIBRARY.impl("select_tokens_backward.triton", select_tokens_backward, "CompositeExplicitAutograd")
