"""The kernels of the pass itself compile for three GPU generations at the sizes they are for, without spilling."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from compile_only import ARCHITECTURES, check, compile_all, compiled_by


class Deformable(NamedTuple):
    """A call and its backward over levels of an image of 800 × 1066, each half as large as the one before."""

    queries: int
    dtype: str = "bfloat16"
    levels: int = 4
    points: int = 4
    width: int = 32
    box: bool = False  # reference points with a width and a height
    height: int = 100  # of the first level

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        sizes = [(-(-self.height // 2**level), -(-134 // 2**level)) for level in range(self.levels)]
        shapes = [size for pair in sizes for size in pair]
        value = empty(2, sum(height * width for height, width in sizes), 8, self.width)
        reference = empty(2, self.queries, self.levels, 4 if self.box else 2, dtype="float32")
        offsets = empty(2, self.queries, 8, self.levels, self.points, 2)
        arguments = value, shapes, reference, offsets, empty(*offsets.shape[:5])
        dout = kernels.deformable_attention.deformable_attention(*arguments)
        kernels.deformable_attention_backward.deformable_attention_backward(dout, *arguments, self.box)


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again.
CASES = (
    Deformable(17821),
    Deformable(17821, dtype="float32"),
    Deformable(900, box=True),
    Deformable(900, dtype="float32", box=True),
)
HOPPER = (
    Deformable(17821, dtype="float16"),
    Deformable(17821, levels=3, points=8, width=64),
    Deformable(900, levels=5, points=3, width=48),  # none a power of two
    Deformable(900, levels=1, points=1, width=256),
    Deformable(17821, height=128),
)
KERNELS = {"deformable_attention_kernel", "points_gradient_kernel", "value_sums_kernel", "dvalue_kernel"}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compiled_by(__file__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    check(compiled, architecture, KERNELS, record_table)


def test_hopper_holds_enough_warps_to_wait_for_memory(compiled):
    """A multiprocessor needs some 40 KiB on their way for its share of 4.8 TB/s at 1 µs, and L2 is faster. A warp has a
    level's 16 reads of 16 bytes a thread, 8 KiB; 16 warps share 65,536 registers."""
    rows = [row for row in compiled if row["sm"] == 90 and row["kernel"] == "deformable_attention_kernel"]
    rows = [row for row in rows if (row["dtype"], row["queries"], row["width"]) == ("bfloat16", 17821, 32)]
    assert rows
    for row in rows:
        assert 16 * 32 * row["registers"] <= 65536, row


def test_other_sizes_of_levels_compile_nothing_anew(compiled):
    """128, 64, 32 and 16 rows, for which Triton would: what it knows of an argument are multiples of 16."""
    assert not [row for row in compiled if row["height"] != 100]


if __name__ == "__main__":
    print(json.dumps(compile_all({80: CASES, 90: CASES + HOPPER, 100: CASES})))
