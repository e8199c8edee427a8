"""Gives the affinity kernels' launchers what they share: operands in a layout that is read fast, splits and sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .affinity_device import column_sums_kernel, combine_kernel

MAX_KEY_WIDTH = 256  # a row of q is one operand tile
MAX_CHUNKS = 32  # chunks of pixels in a sum over them; the reader adds them up in one tile
# A launch tries to fill this many multiprocessors. It is a constant because the number of splits, and with it the order
# of the sums, must depend on the sizes of one image alone, not on the device or the batch.
MULTIPROCESSORS = 132


def round_up(size: int, multiple: int) -> int:
    return triton.cdiv(size, multiple) * multiple


class Columns(NamedTuple):
    """Cuts value columns into blocks of two tiles, each a power of two wide: 150 columns are 128 and 32, not 256."""

    total: int  # a multiple of 16; the last block may reach beyond
    count: int
    main: int
    tail: int  # 0: no second tile

    @property
    def width(self) -> int:
        return self.main + self.tail

    @classmethod
    def of(cls, size: int, largest: int) -> Columns:
        total = round_up(max(size, 1), 16)
        count = triton.cdiv(total, largest)
        width = triton.cdiv(total, count)
        main = triton.next_power_of_2(width)
        tail = triton.next_power_of_2(max(width - main // 2, 16))
        return cls(total, count, main, 0) if tail >= main // 2 else cls(total, count, main // 2, tail)


def is_aligned(x: Tensor, columns: int) -> bool:
    """Tell whether rows or columns of x [B, N, D] can be read 16 bytes at a time and D is ``columns``, without
    padding."""
    batch, row, column = x.stride()
    pitch, extent = (row, columns) if column == 1 else (column, x.shape[1])
    return (
        x.shape[2] == columns
        and 1 in (row, column)
        and all(size % 16 == 0 for size in (batch if x.shape[0] > 1 else 0, pitch, extent))
        and x.data_ptr() % 16 == 0
    )


def aligned(x: Tensor, columns: int) -> Tensor:
    """Pad x [B, N, D] with zeros up to ``columns``; return x itself if the kernels read it fast as it is.

    Either of the last two axes may be the contiguous one, so the NCHW view of an even picture is not copied. An operand
    that is not aligned would be read 2 bytes at a time in an N² loop; one copy of N·D costs less.
    """
    return x if is_aligned(x, columns) else torch.nn.functional.pad(x, (0, columns - x.shape[2])).contiguous()


def key_columns(op: str, q: Tensor) -> int:
    if q.shape[2] > MAX_KEY_WIDTH:
        raise ValueError(f"{op}: impl='triton' takes q and k of up to {MAX_KEY_WIDTH} columns, got {q.shape[2]}")
    return round_up(max(q.shape[2], 1), 16)


def key_blocks_of_split(row_programs: int, key_blocks: int, cost: float, per_multiprocessor: int = 1) -> int:
    """Return how many key blocks one program takes, for the split with the shortest time of one image.

    The time is the number of waves of programs, in units of all the work spread evenly, plus ``cost`` per split to
    write and read its float32 sums.
    """
    slots = MULTIPROCESSORS * per_multiprocessor

    def time(splits: int) -> float:
        programs = row_programs * splits
        return triton.cdiv(programs, slots) * slots / programs + splits * cost

    return triton.cdiv(key_blocks, min(range(1, min(key_blocks, 16) + 1), key=time))


def split_cost(pixels: int, key_width: int, value_width: int) -> float:
    """Compute the time of a split's sums (8 bytes each at 8 TB/s, mostly L2) ÷ that of the products at 600 TFLOP/s."""
    return 300 * value_width / (pixels * (key_width + value_width))


def column_sums(x: Tensor, y: Tensor | None, columns: int, copy: bool) -> tuple[Tensor, Tensor | None]:
    """Sum x or ½ (x + y) over chunks of pixels, float32 [chunks, B, columns]; with ``copy`` return x or ½ (x − y),
    too."""
    batches, pixels, width = x.shape
    per_chunk = round_up(max(triton.cdiv(pixels, MAX_CHUNKS), 64), 32)
    sums = x.new_empty(triton.cdiv(pixels, per_chunk), batches, columns, dtype=torch.float32)
    difference = x.new_empty(batches, pixels, columns) if copy else None
    strides = (*x.stride(), *((0, 0, 0) if y is None else y.stride()))
    if sums.numel():
        column_sums_kernel[(batches * sums.shape[0] * triton.cdiv(columns, 64),)](
            x, y, difference, sums, pixels, width, columns, batches, sums.shape[0], per_chunk, *strides,
            BLOCK_N=32, BLOCK_D=64, num_warps=4, num_stages=3,
        )  # fmt: skip
    return sums, difference


def combine(
    partial: Tensor, sums: Tensor | None, plus: Tensor, minus: Tensor | None, factor: float,
    device_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """See combine_kernel."""
    parts, batches, pixels, columns = partial.shape
    width = plus.shape[2]
    if plus.numel():
        combine_kernel[batches * triton.cdiv(pixels, 16), triton.cdiv(width, 64)](
            partial, sums, plus, minus, device_factor, factor,
            pixels, width, columns, batches, 0 if sums is None else sums.shape[0],
            PARTS=parts, CHUNKS=MAX_CHUNKS, BLOCK_N=16, BLOCK_D=64, num_warps=4,
        )  # fmt: skip
