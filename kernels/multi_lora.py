"""Triton implementation of fastcss::multi_lora: y_s = x_s Wᵀ + bias + scale_t (x_s A_tᵀ) B_tᵀ for every slot s.

The limits are these, for S slots of M rows in bf16 on a GPU of 4.3 TB/s and 700 TFLOP/s (a byte is worth 163 FLOP):

- Shared x, large M: the base GEMM has 2·M·N·K FLOP, and y has 2·S·M·N bytes, so writing y is the limit up to
  K ≈ 163·S. The base tile is computed once, stays in registers for all slots and never goes to memory.
- An x for each slot, large M: the base GEMM is the limit and the rank loop adds r/K to it. The shrink is either a
  launch of its own, which reads x once more, or goes into the K loop of the base GEMM, which then has r more columns in
  every column block. Reading an element of x again (2 bytes; a column takes 2 FLOP of it) costs as much as 163 such
  columns.
- M ≤ 64: the limits are latency, and W from L2, where all slots share it. One launch is parallel over slots and narrow
  column blocks.

Tiles depend on the rows of one slot and on the layer, never on the number of slots or on what is in them, so a slot's
result is the same whatever the other slots are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._dispatch.private_apis import gpu_architecture
from .._schema import LIBRARY
from .multi_lora_device import expand_kernel, fused_kernel, shrink_kernel
from .tuned import tuned

SMALL_M = 64
# The shrink is cheaper inside the base GEMM than reading x again, up to so many columns over all column blocks.
FUSED_COLUMNS = 128


class Adapters(NamedTuple):
    """Holds the adapters as the kernels see them. The gradient of x swaps the two sides."""

    down: Tensor  # [Σr, K]
    up: Tensor  # [Σr, N]
    offsets: Tensor  # int32 [T + 1]
    scales: Tensor  # float32 [T]
    index: Tensor | None  # [S]
    max_rank: int

    @property
    def count(self) -> int:
        return self.scales.shape[0]

    @property
    def slots(self) -> int:
        return self.count if self.index is None else self.index.shape[0]

    def new_hidden(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Allocate h: [M, Σr] in the packed order, or [S, M, max_rank] with an index."""
        shape = (rows, self.down.shape[0]) if self.index is None else (self.slots, rows, self.max_rank)
        return self.down.new_empty(shape, dtype=dtype)

    @classmethod
    def of(cls, lora_a, lora_b, offsets, scales, index, max_rank) -> Adapters:
        tensors = (None if t is None else t.contiguous() for t in (lora_a, lora_b, offsets, scales, index))
        return cls(*tensors, max_rank)

    def hidden_strides(self, rows: int) -> tuple[int, int]:
        """Return the strides of slots and rows of h. In the packed order, slots differ in their first column
        instead."""
        return (0, self.down.shape[0]) if self.index is None else (rows * self.max_rank, self.max_rank)


def slot_strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of slots, rows and columns; a shared x is the same in every slot."""
    return (0, *x.stride()) if x.dim() == 2 else x.stride()


def precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rank_block(max_rank: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(max_rank), 16), largest)


def _tile(m: int, n: int, k: int, r: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}


def _operands_stay_in_shared_memory() -> bool:
    """Tell whether tensor cores read operands from shared memory, as those of Hopper and data-centre Blackwell: that
    leaves registers for 256 columns."""
    return not triton.knobs.runtime.interpret and 90 <= gpu_architecture() < 120


@tuned("BLOCK_M", "BLOCK_N", "BLOCK_K")
def fused_tile(rows: int, max_rank: int, dtype: torch.dtype) -> dict[str, int]:
    block_r = rank_block(max_rank, 128)
    if dtype == torch.float32:
        m, n, k, warps, stages = 16 if rows <= 16 else 32, 32, 32, 4, 2
    elif rows <= 32:
        m, n, k, warps, stages = 16 if rows <= 16 else 32, 32, 128 if block_r <= 64 else 64, 4, 4
    elif rows <= SMALL_M:
        m, n, k, warps, stages = 64, 64, 64, 4, 4
    else:
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    return _tile(m, n, k, block_r, warps, stages)


@tuned("BLOCK_M", "BLOCK_K")
def shrink_tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    k, stages = (32, 2) if dtype == torch.float32 else (64, 4)
    return {"BLOCK_M": 64, "BLOCK_R": rank_block(width, 64), "BLOCK_K": k, "num_warps": 4, "num_stages": stages}


@tuned("BLOCK_M", "BLOCK_N", "BLOCK_K")
def expand_tile(rows: int, width: int, max_rank: int, dtype: torch.dtype, over_slots: str) -> dict[str, int]:
    if dtype == torch.float32:
        m, n, k, warps, stages = 64, 64, 32, 8, 3
    elif rows * width <= 128 * 128 * 132:  # too few large tiles for the SMs of one GPU
        m, n, k, warps, stages = 64, 128, 64, 4, 3
    elif over_slots == "write":  # base and output are both in registers
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    else:
        m, n, k, warps, stages = 128, 256 if _operands_stay_in_shared_memory() else 128, 64, 8, 3
    return _tile(m, n, k, rank_block(max_rank, 64), warps, stages)


def shrink(x: Tensor, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """h = scale · x downᵀ. A shared x meets all rows of ``down`` stacked in one GEMM."""
    rows, depth = x.shape[-2:]
    h = adapters.new_hidden(rows, dtype)
    stacked = x.dim() == 2 and adapters.index is None
    width = adapters.down.shape[0] if stacked else adapters.max_rank
    tile = shrink_tile(width, x.dtype)
    blocks = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_R"])
    if h.numel():
        shrink_kernel[(blocks * (1 if stacked else adapters.slots),)](
            x, adapters.down, h, adapters.offsets, adapters.scales, adapters.index,
            rows, depth, width, adapters.count, *slot_strides(x), *adapters.hidden_strides(rows),
            STACKED=stacked, SEARCH_STEPS=adapters.count.bit_length(), PRECISION=precision(x.dtype), **tile,
        )  # fmt: skip
    return h


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, adapters: Adapters, over_slots: str) -> Tensor:
    """x Wᵀ + bias + h_s up_t: [S, M, N], or with ``over_slots`` "sum" [M, N]."""
    (rows, depth), width = x.shape[-2:], weight.shape[0]
    y = x.new_empty((rows, width) if over_slots == "sum" else (adapters.slots, rows, width))
    tile = expand_tile(rows, width, adapters.max_rank, x.dtype, over_slots)
    blocks = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"])
    if y.numel():
        expand_kernel[(blocks * (adapters.slots if over_slots == "none" else 1),)](
            x, weight, bias, adapters.up, h, y, adapters.offsets, adapters.index,
            rows, width, depth, adapters.slots, adapters.count,
            *slot_strides(x), *weight.stride(), *adapters.hidden_strides(rows),
            OVER_SLOTS=over_slots, ONE_BLOCK=adapters.max_rank <= tile["BLOCK_R"], PRECISION=precision(x.dtype), **tile,
        )  # fmt: skip
    return y


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, h: Tensor | None) -> Tensor:
    """Compute the whole layer in one launch; h is written if it is given."""
    (rows, depth), width = x.shape[-2:], weight.shape[0]
    y = x.new_empty(adapters.slots, rows, width)
    tile = fused_tile(rows, adapters.max_rank, x.dtype)
    blocks = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"])
    if y.numel():
        fused_kernel[(blocks * adapters.slots,)](
            x, weight, bias, adapters.down, adapters.up, h, y, adapters.offsets, adapters.scales, adapters.index,
            rows, width, depth, adapters.count,
            *slot_strides(x), *weight.stride(), *adapters.hidden_strides(rows), PRECISION=precision(x.dtype), **tile,
        )  # fmt: skip
    return y


def use_fused(x: Tensor, width: int, adapters: Adapters) -> bool:
    """Tell whether the one-launch kernel is the better one."""
    rows = x.shape[-2]
    tile = fused_tile(rows, adapters.max_rank, x.dtype)
    if width == 0 or not 0 < adapters.max_rank <= tile["BLOCK_R"]:
        return False
    columns = triton.cdiv(width, tile["BLOCK_N"]) * tile["BLOCK_R"]
    return rows <= SMALL_M or (x.dim() == 3 and x.dtype != torch.float32 and columns <= FUSED_COLUMNS)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, hidden_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Return (y [S, M, N], h in ``hidden_dtype``, or None if that is None)."""
    if use_fused(x, weight.shape[0], adapters):
        h = None if hidden_dtype is None else adapters.new_hidden(x.shape[-2], hidden_dtype)
        return fused(x, weight, bias, adapters, h), h
    h = shrink(x, adapters, hidden_dtype or x.dtype)
    return expand(x, weight, bias, h, adapters, "write" if x.dim() == 2 else "none"), h


def multi_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scales: Tensor,
    index: Tensor | None,
    max_rank: int,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    adapters = Adapters.of(lora_a, lora_b, offsets, scales, index, max_rank)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        y, h = linear(x, weight, bias, adapters, torch.float32 if save_h else None)
    return y, h if save_h else x.new_empty(0, dtype=torch.float32)


LIBRARY.impl("multi_lora.triton", multi_lora, "CompositeExplicitAutograd")
