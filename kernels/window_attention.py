"""Triton implementation of fastcss::window_attention: each token is read from its place in the map.

A token's channel has 8 bytes of q, k, v and output in bfloat16 for 4 window² FLOP. That makes 41 MB and 1 GFLOP for the
first stage of Swin-T at 800 × 1066, so memory is the limit, and after it the instructions of the softmax. A program
takes one head of some consecutive windows; each has one tile [window², window²] of scores:

- the 4 warps of one program are the warpgroup that multiplies 64 rows, enough for 7² tokens, and several programs on a
  multiprocessor wait for memory at the same time;
- a token's head is 64 bytes, whole sectors, and programs of neighbouring heads, which read the bytes beside them, run
  together;
- the bias, 49 × 49 single reads, is a third of what a window reads: it stays in registers from window to window;
- the mask of shifted windows is made from the rows and columns of the few windows that wrap around;
- padding tokens are one row that is read in their place.

Windows of more tokens than a tile has rows go in blocks of queries, each with a running softmax over blocks of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .affinity_device import exp2
from .affinity_tiles import MULTIPROCESSORS
from .class_centers import LOG2_E, finite_or_zero
from .multi_lora import _operands_stay_in_shared_memory, precision
from .multi_lora_device import dot
from .tuned import tuned
from .window_attention_device import (
    exp_above,
    load_bias,
    load_filled,
    load_tokens,
    scores_of,
    store_tokens,
    tokens_at,
    window_at,
)

PER_MULTIPROCESSOR = 4  # programs: their registers allow this many
REGISTERS = 65536 // (PER_MULTIPROCESSOR * 128)
# Kernels do not get better if Triton knows which of these are multiples of 16.
SIZES = ["H", "W", "rows", "columns", "heads", "shift", "windows", "per_program"]


@triton.jit(do_not_specialize=SIZES)
def window_attention_kernel(
    q, k, v, bias, pad_key, pad_value, out,
    q_strides, k_strides, v_strides, key_pad_strides, value_pad_strides,
    H, W, rows, columns, heads, shift, windows, per_program, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = WINDOW * WINDOW
    BLOCKS: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    sizes = (H, W, rows, columns)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // (heads * BLOCKS) * per_program
    queries = tl.program_id(0) // heads % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    bias_tile = load_bias(bias, head, queries, tl.arange(0, BLOCK), COUNT)
    # Values that can be computed again must not stay in registers from window to window.
    for number in tl.range(first, min(first + per_program, windows), disable_licm=True):
        sample, window = window_at(number, sizes, shift, WINDOW)
        place, in_map, there = tokens_at(queries, sample, head, window, sizes, WINDOW)
        q_tile = load_tokens(q, q_strides, place, in_map, D, BLOCK_D, WIDE)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for n in range(0, COUNT, BLOCK):
            keys = n + tl.arange(0, BLOCK)
            at, inside, is_key = tokens_at(keys, sample, head, window, sizes, WINDOW)
            k_tile = load_filled(k, k_strides, pad_key, key_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
            v_tile = load_filled(v, v_strides, pad_value, value_pad_strides, at, inside, is_key, D, BLOCK_D, WIDE)
            if BLOCKS > 1:
                bias_tile = load_bias(bias, head, queries, keys, COUNT)
            scores = scores_of(q_tile, k_tile, bias_tile, queries, keys, window, sizes, scale, WINDOW, PRECISION)
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            base = finite_or_zero(largest) * LOG2_E
            weights = exp_above(scores, base)
            if BLOCKS > 1:
                kept = exp2(before * LOG2_E - base)
                mass, acc = mass * kept, acc * kept[:, None]
            mass += tl.sum(weights, 1)
            acc = dot(weights.to(v_tile.dtype), v_tile, acc, PRECISION)
        store_tokens(out, acc * (1.0 / mass)[:, None], place, in_map & there, sizes, heads, D, WIDE)


class Operands(NamedTuple):
    """Holds what the kernels read: only channels have to be next to each other."""

    q: Tensor  # [B, H, W, heads, D]
    k: Tensor
    v: Tensor
    bias: Tensor  # [heads, window², window²], dense: then its addresses are one and constants
    pad_key: Tensor  # [B, heads, D]
    pad_value: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad_key: Tensor, pad_value: Tensor) -> Operands:
        q, k, v, pad_key, pad_value = (adjacent(x) for x in (q, k, v, pad_key, pad_value))
        return cls(q, k, v, bias.contiguous(), pad_key, pad_value)

    def strides(self) -> tuple[tuple[int, ...], ...]:
        q, k, v, _, *pads = self
        return *(x.stride()[:4] for x in (q, k, v)), *(x.stride()[:2] for x in pads)

    def sizes(self, window: int) -> tuple[int, ...]:
        """Return (H, W, rows of windows, columns of windows, heads)."""
        _, height, width, heads, _ = self.q.shape
        return height, width, triton.cdiv(height, window), triton.cdiv(width, window), heads

    def wide(self, *more: Tensor) -> bool:
        """Tell whether a sample of any of them, or of a dense result, is too large for offsets of 32 bits."""
        maps = self.q, self.k, self.v, *more
        extents = (sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in maps)
        return max(self.q[0].numel(), *extents) >= 2**31

    def windows(self, window: int) -> int:
        _, _, rows, columns, _ = self.sizes(window)
        return self.q.shape[0] * rows * columns


def adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block_sizes(window: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose one tile for all tokens of a window if 64 rows are enough; fewer rows if channels fill the registers."""
    block_d = max(triton.next_power_of_2(width), 16)
    largest = min(max((4096 if dtype == torch.float32 else 8192) // block_d, 16), 64)
    return {"BLOCK": min(max(triton.next_power_of_2(window**2), 16), largest), "BLOCK_D": block_d}


@tuned()
def warps_and_stages(window: int, width: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Choose warps and stages; and a limit on registers per thread, if that lets more programs run on a
    multiprocessor."""
    tile = block_sizes(window, width, dtype)
    if dtype == torch.float32 or tile["BLOCK_D"] > 128:
        return {"num_warps": 8, "num_stages": 1, "maxnreg": None}
    # Three stages load the next window while this one is computed.
    stages = 3 if _operands_stay_in_shared_memory() else 2
    whole = window**2 <= tile["BLOCK"] and tile["BLOCK_D"] <= 32
    return {"num_warps": 4, "num_stages": stages, "maxnreg": REGISTERS if whole else None}


def windows_of_program(windows: int, heads: int, per_multiprocessor: int) -> int:
    """Return how many windows one program takes, so that all programs run at once."""
    return triton.cdiv(windows * heads, MULTIPROCESSORS * per_multiprocessor)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad_key: Tensor, pad_value: Tensor,
    window: int, shift: int, scale: float,
) -> Tensor:  # fmt: skip
    batch, height, width, heads, channels = q.shape
    out = q.new_empty(batch, height, width, heads * channels)
    if not out.numel():
        return out
    operands = Operands.of(q, k, v, bias, pad_key, pad_value)
    tile = block_sizes(window, channels, q.dtype)
    blocks, windows = triton.cdiv(window**2, tile["BLOCK"]), operands.windows(window)
    per_program = windows_of_program(windows, heads, PER_MULTIPROCESSOR) if blocks == 1 else 1
    with torch.cuda.device_of(q):
        window_attention_kernel[(triton.cdiv(windows, per_program) * blocks * heads,)](
            *operands, out, *operands.strides(), *operands.sizes(window), shift, windows, per_program, scale,
            WINDOW=window, D=channels, PRECISION=precision(q.dtype), **tile,
            WIDE=operands.wide(), **warps_and_stages(window, channels, q.dtype),
        )  # fmt: skip
    return out


LIBRARY.impl("window_attention.triton", window_attention, "CompositeExplicitAutograd")
