"""The kernels of bi_attention compile for three GPU generations at the sizes of the model, without spilling."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from compile_only import ARCHITECTURES, check, compile_all, compiled_by


class BiAttention(NamedTuple):
    """A call and its backward on an image of 800 × 1066 and a text, with four heads."""

    length: int
    dtype: str = "bfloat16"
    width: int = 256
    masks: bool = True
    pixels: int = 17821

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        q, k = (empty(2, tokens, 4, self.width) for tokens in (self.pixels, self.length))
        masks = [empty(2, tokens, dtype="bool") if self.masks else None for tokens in (self.length, self.pixels)]
        inputs = q, k, q, k, *masks
        image, text, *statistics = kernels.bi_attention.bi_attention(*inputs, self.width**-0.5, 2)
        kernels.bi_attention_backward.bi_attention_backward(
            image, text, *inputs, text, *statistics, self.width**-0.5
        )  # fmt: skip


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again.
CASES = (
    BiAttention(20),
    BiAttention(256),
    BiAttention(20, dtype="float32"),
    BiAttention(256, dtype="float32"),
)
HOPPER = (
    BiAttention(64),
    BiAttention(256, dtype="float16"),
    BiAttention(20, masks=False),
    BiAttention(256, masks=False),
    BiAttention(195, width=48),  # none a power of two
)
KERNELS = {"attend_kernel", "combine_kernel", "delta_kernel", "gradient_kernel", "add_parts_kernel"}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compiled_by(__file__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    check(compiled, architecture, KERNELS, record_table)


def test_two_programs_of_a_short_text_share_a_hopper_multiprocessor(compiled):
    """Where memory is the limit, one loads while the other multiplies: 65,536 registers and 227 KiB for both, of which
    the system takes 1 KiB each."""
    rows = [row for row in compiled if row["sm"] == 90 and row["kernel"] == "attend_kernel"]
    rows = [row for row in rows if row["dtype"] == "bfloat16" and row["length"] == 20]
    assert rows
    for row in rows:
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
        assert 2 * (row["shared"] + 1024) <= 227 * 1024, row


if __name__ == "__main__":
    print(json.dumps(compile_all({80: CASES, 90: CASES + HOPPER, 100: CASES})))
