"""The kernels of cost_filter compile for three GPU generations at the sizes they are for, and without spilling."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from compile_only import ARCHITECTURES, check, compile_all, compiled_by


class CostFilter(NamedTuple):
    """cost_filter and its backward on a batch of 24 × 24 pixels."""

    classes: int
    prompts: int
    kept: int
    depth: int = 512
    dtype: str = "bfloat16"
    layout: str = "last"  # where the channels are

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        image = empty(5, 24, 24, self.depth)
        if self.layout == "first":
            image = empty(5, self.depth, 24, 24).permute(0, 2, 3, 1)
        text, nothing = empty(1, self.classes, self.prompts, self.depth), empty(0, dtype="float32")
        cost, index, _ = kernels.cost_filter.cost_filter(image, text, nothing, nothing, self.kept)
        kernels.cost_filter_backward.cost_filter_backward(empty(*cost.shape), image, text, cost, index)


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again.
CASES = (CostFilter(150, 80, 32), CostFilter(847, 1, 32))
HOPPER = (
    CostFilter(847, 1, 256, depth=768, layout="first"),
    CostFilter(20000, 1, 512),
    CostFilter(847, 1, 32, dtype="float32"),
)
KERNELS = {
    "row_scale_kernel", "largest_cost_kernel", "class_score_kernel", "top_classes_kernel", "kept_cost_kernel",
    "unit_rows_kernel", "cosine_gradient_kernel", "text_gradient_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compiled_by(__file__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    rows = [row for row in compiled if row["sm"] == architecture]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        record_table("compiled cost filter kernels", row)
    check(rows, architecture)


if __name__ == "__main__":
    print(json.dumps(compile_all({80: CASES, 90: CASES + HOPPER, 100: CASES})))
