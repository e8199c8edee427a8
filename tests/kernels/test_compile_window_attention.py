"""The kernels of window attention compile for three GPU generations at the sizes of Swin, and without spilling."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from compile_only import ARCHITECTURES, SHARED_MEMORY, check, compile_all, compiled_by


class Windows(NamedTuple):
    """A call and its backward; the map is that of a stage of Swin at 800 × 1066."""

    stage: int = 0
    dtype: str = "bfloat16"
    window: int = 7
    shift: int = 3
    width: int = 32
    need_bias: bool = True
    packed: bool = False  # q, k and v from one linear layer

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape):
            return torch.empty(shape, dtype=getattr(torch, self.dtype), device="meta")

        kernels.register()
        height, width, heads = -(-200 // 2**self.stage), -(-267 // 2**self.stage), 3 * 2**self.stage
        if self.packed:
            q, k, v = empty(2, height, width, 3, heads, self.width).unbind(3)
        else:
            q, k, v = (empty(2, height, width, heads, self.width) for _ in range(3))
        bias = empty(heads, self.window**2, self.window**2)
        pads = (empty(heads, self.width).expand(2, -1, -1) for _ in range(2))
        arguments = q, k, v, bias, *pads, self.window, self.shift, self.width**-0.5
        dout = kernels.window_attention.window_attention(*arguments)
        kernels.window_attention_backward.window_attention_backward(dout, *arguments, self.need_bias)


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again.
CASES = (
    Windows(),
    Windows(need_bias=False),
    Windows(window=12, shift=6),
    Windows(dtype="float32"),
    Windows(dtype="float32", window=12, shift=6),
)
HOPPER = (
    *(Windows(stage, shift=shift) for stage in range(4) for shift in (0, 3)),
    Windows(packed=True),
    Windows(dtype="float16"),
    Windows(window=8, shift=4),
    Windows(window=8, shift=4, need_bias=False),
    Windows(window=5, shift=2, width=20),
)
KERNELS = {
    "window_attention_kernel", "window_gradients_kernel", "sum_parts_kernel",
    "query_gradients_kernel", "key_gradients_kernel", "bias_gradients_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compiled_by(__file__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    check(compiled, architecture, KERNELS, record_table)


def test_hopper_holds_the_programs_that_are_to_run_at_once(compiled):
    """A program takes as many windows as it takes for one wave of them."""
    programs = {"window_attention_kernel": (4, 4), "window_gradients_kernel": (3, 2)}
    rows = [row for row in compiled if row["sm"] == 90 and row["dtype"] == "bfloat16"]
    rows = [row for row in rows if row["kernel"] in programs and row["window"] in (7, 8)]
    assert {row["kernel"] for row in rows} == set(programs)
    for row in rows:
        count = programs[row["kernel"]][row["need_bias"]]
        assert count * 32 * row["warps"] * row["registers"] <= 65536, row
        assert count * row["shared"] <= SHARED_MEMORY[90], row


def test_all_stages_share_their_kernels(compiled):
    """Neither the sizes of the map nor heads, shift or strides of a packed projection make a kernel of their own."""
    alike = [row for row in compiled if (row["dtype"], row["window"], row["width"]) == ("bfloat16", 7, 32)]
    assert not [row for row in alike if (row["stage"] or row["packed"]) and row["kernel"] != "sum_parts_kernel"]


if __name__ == "__main__":
    print(json.dumps(compile_all({80: CASES, 90: CASES + HOPPER, 100: CASES})))
