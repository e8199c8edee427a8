"""Triton implementation of fastcss::relative_attention: no map of scores or of their bias.

The bias of a query is Sh + Sw numbers, [N, Sh + Sw] of a head, which a kernel before writes in float32
(relative_attention_tables). A program takes 128 queries and goes through the keys in tiles of whole rows of 16 or 32
columns, a column of tiles after the other: so the numbers of the columns stay in registers, and a row has one number a
query, which goes into what the exponential subtracts: the bias costs no instruction of an element. It is −∞ where a
tile reaches beyond the window, and nothing else is masked.

At 64² with 12 heads of 64 channels in bfloat16 one Hopper SM has 96 steps of 128 queries and 128 keys. By the
compiled loop (574 instructions, 66 of the special-function unit, in 8 warps) and data sheets a step takes 1,024 clocks
of tensor cores, 1,056 of exponentials, 1,148 to issue, and 1,500 for keys and values from L2 at 5.5 TB/s. All beside
each other is 80 µs, tensor cores and instructions in turn 114 µs; the products alone are 52 µs. Nothing of this was
measured on a GPU. 64 queries a program would ask L2 for twice as much; 256 leave half a wave empty at one image.

80 channels are tiles of 64 and 16, not one of 128 with 37% of it for nothing. In windows the tokens that fill up are
rows that are read in place of others, and they are no queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch.private_apis import gpu_architecture
from .._schema import LIBRARY
from .affinity_device import exp2
from .affinity_tiles import Columns
from .class_centers import LOG2_E, finite_or_zero
from .multi_lora import _operands_stay_in_shared_memory, precision
from .multi_lora_device import dot
from .relative_attention_device import (
    exp_above,
    head_of,
    load_bias,
    load_keys,
    load_queries,
    products,
    program_at,
    queries_at,
    queries_in,
    scores_of,
    store_rows,
)
from .relative_attention_tables import relative_bias_kernel
from .tuned import tuned
from .window_attention import adjacent

MAX_WIDTH = 256  # a head's row is one pair of operand tiles
MAX_STRIDE = 2**24  # times a tile's rows this still fits in 32 bits


@triton.jit
def relative_attention_kernel(
    q, k, v, bias, pad_key, pad_value, out, stats,
    q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, Sh, Sw, heads, blocks, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, FILLED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    sizes = (H, W, Sh, Sw)
    sample, head, _, corner, block = program_at(sizes, heads, blocks)
    rows, columns = queries_in(sizes, corner)
    first = block * BLOCK
    if first >= rows * columns:
        return
    place = queries_at(first, sizes, corner, BLOCK, WHOLE)
    q_tiles = load_queries(head_of(q, q_strides, sample, head), q_strides, place, D, MAIN, TAIL)
    k, v = head_of(k, k_strides, sample, head), head_of(v, v_strides, sample, head)
    pad_key += sample * key_pad_strides[0] + tl.cast(head, tl.int64) * key_pad_strides[1]
    pad_value += sample * value_pad_strides[0] + tl.cast(head, tl.int64) * value_pad_strides[1]
    bias += (sample * heads + head) * H * W * (Sh + Sw)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, MAIN], tl.float32)
    tail = tl.zeros([BLOCK, TAIL if TAIL else 1], tl.float32)
    for column in range(0, Sw, COLUMNS):
        first += column // Sw  # 0, or else the compiler would keep the queries' places in registers, for the end
        bias_w = load_bias(bias, place, Sh + column + tl.arange(0, COLUMNS), Sh + Sw, sizes, MASKED)
        for row in range(0, Sh, ROWS):
            k_tiles = load_keys(
                k, k_strides, pad_key, row, column, sizes, corner, D, MAIN, TAIL, ROWS, COLUMNS, MASKED, FILLED
            )  # fmt: skip
            bias_h = load_bias(bias, place, row + tl.arange(0, ROWS), Sh, sizes, MASKED)
            scores = scores_of(products(q_tiles, k_tiles, TAIL, PRECISION), bias_w, scale, ROWS, COLUMNS)
            before, largest = largest, tl.maximum(largest, tl.max(tl.max(scores, 2) + bias_h, 1))
            base = finite_or_zero(largest)
            weights = exp_above(scores, bias_h, base, q.dtype.element_ty == tl.float32)
            kept = exp2((before - base) * LOG2_E)
            mass = mass * kept + tl.sum(weights, 1)
            v_tiles = load_keys(
                v, v_strides, pad_value, row, column, sizes, corner, D, MAIN, TAIL, ROWS, COLUMNS, MASKED, FILLED
            )  # fmt: skip
            weights = weights.to(v_tiles[0].dtype)
            acc = dot(weights, v_tiles[0], acc * kept[:, None], PRECISION)
            if TAIL:
                tail = dot(weights, v_tiles[1], tail * kept[:, None], PRECISION)
    inverse = 1.0 / mass
    row, column, there = queries_at(first, sizes, corner, BLOCK, WHOLE)
    token = (row * W + column).to(tl.int64)
    out += (sample * H * W * heads + head) * D
    store_rows(out, (acc * inverse[:, None], tail * inverse[:, None]), token * (heads * D), there, D, MAIN, TAIL)
    stats += (sample * heads + head) * H * W * 2
    tl.store(stats + token * 2, largest, mask=there)
    tl.store(stats + token * 2 + 1, tl.log(mass), mask=there)


class Operands(NamedTuple):
    """Holds what the kernels read: only channels have to be next to each other."""

    q: Tensor  # [B, H, W, heads, D]
    k: Tensor
    v: Tensor
    pad_key: Tensor  # [B, heads, D]
    pad_value: Tensor
    rel_h: Tensor  # [2 Sh − 1, D], dense
    rel_w: Tensor
    size: tuple[int, int]  # of a window

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, pad_key: Tensor, pad_value: Tensor,
        window: int,
    ) -> Operands:  # fmt: skip
        q, k, v = (readable(x) for x in (q, k, v))
        if q.stride(1) != q.shape[2] * q.stride(2):  # the rows of a map follow each other
            q = q.contiguous()
        size = (window, window) if window else tuple(q.shape[1:3])
        return cls(q, k, v, adjacent(pad_key), adjacent(pad_value), rel_h.contiguous(), rel_w.contiguous(), size)

    def strides(self) -> tuple[tuple[int, ...], ...]:
        pads = self.pad_key, self.pad_value
        return *(x.stride()[:4] for x in (self.q, self.k, self.v)), *(x.stride()[:2] for x in pads)

    @property
    def windows(self) -> int:
        """The number of them in a map."""
        (height, width), (rows, columns) = self.q.shape[1:3], self.size
        return triton.cdiv(height, rows) * triton.cdiv(width, columns)

    @property
    def queries(self) -> int:
        """The number of them in a window, at most."""
        (height, width), (rows, columns) = self.q.shape[1:3], self.size
        return min(height, rows) * min(width, columns)

    def sizes(self) -> tuple[int, ...]:
        """Return (H, W, Sh, Sw, heads)."""
        _, height, width, heads, _ = self.q.shape
        return height, width, *self.size, heads

    def head_tile(self) -> dict[str, int | str]:
        """Return the constants of kernels that read rows of a head."""
        width = self.q.shape[4]
        columns = Columns.of(width, MAX_WIDTH)
        return {
            "D": width, "MAIN": columns.main, "TAIL": columns.tail, "PRECISION": precision(self.q.dtype),
        }  # fmt: skip

    def key_tile(self, keys: int, columns: int) -> dict[str, int | bool]:
        """Return the constants of kernels that read ``columns`` columns of a window's keys, ``keys`` in all."""
        rows = min(keys // columns, triton.next_power_of_2(self.size[0]))
        filled = any(length % of_window for length, of_window in zip(self.q.shape[1:3], self.size, strict=True))
        masked = bool(self.size[0] % rows or self.size[1] % columns)
        whole = self.size == self.q.shape[1:3]
        return {"ROWS": rows, "COLUMNS": columns, "MASKED": masked, "FILLED": filled, "WHOLE": whole}

    def bias(self) -> Tensor:
        """Compute the bias [B, heads, N, Sh + Sw] in float32."""
        batch, height, width, heads, channels = self.q.shape
        bias = self.q.new_empty(batch, heads, height * width, sum(self.size), dtype=torch.float32)
        tile = table_tile(channels, max(self.size), self.q.dtype)
        lines = [self.line_blocks(across, tile["BLOCK"]) for across in (False, True)]
        relative_bias_kernel[max(lines), 2](
            self.q, self.rel_h, self.rel_w, bias, self.q.stride()[:4], *lines, *self.sizes(),
            **self.head_tile(), **tile,
        )  # fmt: skip
        return bias

    def line_blocks(self, across: bool, block: int) -> int:
        """Count the blocks of queries of all rows of the maps or, ``across``, of their columns."""
        batch, height, width, heads, _ = self.q.shape
        lines, length = (width, height) if across else (height, width)
        return batch * heads * lines * triton.cdiv(length, block)


def readable(x: Tensor) -> Tensor:
    """Return [B, H, W, heads, D] as it is, or a copy if the kernels' offsets cannot reach it."""
    return x if x.stride(4) == 1 and max(x.stride()[1:3]) < MAX_STRIDE else x.contiguous()


def check_width(q: Tensor) -> None:
    if q.shape[4] > MAX_WIDTH:
        raise ValueError(
            f"relative_attention: impl='triton' takes heads of up to {MAX_WIDTH} columns, got {q.shape[4]}"
        )


def columns_of_tile(width: int, keys: int) -> int:
    """Choose how many columns of keys a tile of ``keys`` has: with few beyond the window's."""
    return min((min(keys, 32), 16), key=lambda columns: triton.cdiv(width, columns) * columns)


@tuned("BLOCK", "KEYS")
def attention_tile(queries: int, window: bool, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile for so many queries of a window, or of a map."""
    block, warps = 128, 8
    if dtype == torch.float32:
        block, keys, stages = 32, 16, 1
    elif not _operands_stay_in_shared_memory():
        keys, stages = 32, 2
    elif gpu_architecture() < 100:
        keys, stages = (128, 2) if width <= 64 and not window else (64, 3)
    else:  # Blackwell keeps the accumulator elsewhere, and passes it through registers to scale it
        keys, stages = 64 if width <= 64 else 32, 3
    block = min(block, max(triton.next_power_of_2(queries), 16))
    return {"BLOCK": block, "KEYS": keys, "num_warps": warps, "num_stages": stages}


@tuned("BLOCK", "BLOCK_K")
def table_tile(width: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile of queries and of positions of keys, of which there are ``size``."""
    keys = min(max(triton.next_power_of_2(size), 16), 64)
    block, stages = 64, 2
    if dtype == torch.float32:
        keys, block, stages = min(keys, 32), 32, 1
    elif width > 64 and _operands_stay_in_shared_memory() and gpu_architecture() >= 100:
        stages = 1  # Triton 3.6 cannot pipeline there what two tiles of channels are multiplied with
    return {"BLOCK": block, "BLOCK_K": keys, "num_warps": 4, "num_stages": stages}


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, pad_key: Tensor, pad_value: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_width(q)
    batch, height, width, heads, channels = q.shape
    out = q.new_empty(batch, height, width, heads * channels)
    stats = q.new_empty((batch, heads, height, width, 2), dtype=torch.float32)
    if not out.numel():
        return out, stats.zero_()
    operands = Operands.of(q, k, v, rel_h, rel_w, pad_key, pad_value, window)
    tile = attention_tile(operands.queries, bool(window), channels, q.dtype)
    keys = tile.pop("KEYS")
    keys = operands.key_tile(keys, columns_of_tile(operands.size[1], keys))
    blocks = triton.cdiv(operands.queries, tile["BLOCK"])
    with torch.cuda.device_of(q):
        relative_attention_kernel[(batch * operands.windows * heads * blocks,)](
            *operands[:3], operands.bias(), *operands[3:5], out, stats, *operands.strides(), *operands.sizes(),
            blocks, scale, **operands.head_tile(), **keys, **tile,
        )  # fmt: skip
    return out, stats


LIBRARY.impl("relative_attention.triton", relative_attention, "CompositeExplicitAutograd")
