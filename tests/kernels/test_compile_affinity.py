"""The kernels of the affinity ops compile for three GPU generations at the sizes they are for, and without spilling."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from compile_only import ARCHITECTURES, check, compile_all, compiled_by

DEPTH = 512


class Affinity(NamedTuple):
    """A call of one op on one image, and of its backward where it has one of its own."""

    op: str
    pixels: int
    width: int  # of values, or the number of classes
    key_width: int = 64
    dtype: str = "bfloat16"
    over: str = ""

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        n, d = self.pixels, self.width
        q, k, v = empty(1, n, self.key_width), empty(1, n, self.key_width), empty(1, n, d)
        feats = empty(1, DEPTH, n).mT  # the view of an NCHW tensor
        if self.op == "affinity_attention":
            kernels.affinity_attention.affinity_attention(q, k, v, 1.0, True)
        elif self.op == "affinity_attention_backward":
            kernels.affinity_attention_backward.affinity_attention_backward(v, v, q, k, v, 1.0, True)
        elif self.op == "class_affinity":
            kernels.class_affinity.class_affinity(q, k, feats, empty(1, d, DEPTH), 1.0, True, True)
        elif self.op == "affinity_loss":
            labels, dloss = empty(1, n, dtype="int32"), empty(dtype="float32")
            kernels.affinity_loss.affinity_loss(q, k, labels, 1.0, 255)
            kernels.affinity_loss.affinity_loss_backward(dloss, q, k, labels, 1.0, 255)
        else:
            logits = empty(1, d, n)
            outputs = kernels.class_centers.class_centers(logits, feats, self.over == "classes")
            kernels.class_centers_backward.class_centers_backward(outputs[0], logits, feats, *outputs)


# What a case launches is what is compiled; a kernel that an earlier case has launched alike is not shown again.
CASES = (
    Affinity("class_affinity", 16384, 150),
    Affinity("affinity_attention", 4096, 512),
    Affinity("affinity_attention_backward", 4096, 150),
    Affinity("affinity_loss", 4096, 0),
    Affinity("class_centers", 4096, 150, over="classes"),
)
HOPPER = (
    Affinity("class_affinity", 4096, 21),
    Affinity("affinity_attention", 4096, 150, key_width=256),
    Affinity("affinity_attention", 4096, 150, dtype="float32"),
    Affinity("affinity_attention_backward", 4096, 512),
    Affinity("affinity_attention_backward", 4096, 150, key_width=256),
    Affinity("affinity_loss", 4096, 0, dtype="float32"),
    Affinity("class_centers", 4096, 21, over="pixels"),
    Affinity("class_centers", 9409, 171, over="pixels"),  # 97², whose rows begin anywhere
)
KERNELS = {
    "column_sums_kernel", "combine_kernel", "affinity_kernel", "affinity_gradient_kernel", "attend_classes_kernel",
    "affinity_loss_kernel", "affinity_loss_gradient_kernel", "mean_over_pairs_kernel",
    "pixel_lse_kernel", "class_centers_kernel", "combine_centers_kernel",
    "center_gradient_dots_kernel", "feats_gradient_kernel", "logits_gradient_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return compiled_by(__file__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(compiled, architecture, record_table):
    check(compiled, architecture, KERNELS, record_table)


def test_hopper_holds_two_programs_where_the_splits_count_on_it(compiled):
    """tanh beside products: 65,536 registers for two programs, or more, of up to 160 value columns."""
    rows = [row for row in compiled if row["sm"] == 90 and row["kernel"] == "affinity_kernel"]
    narrow = [row for row in rows if row["width"] <= 150 and row["key_width"] == 64 and row["dtype"] != "float32"]
    assert narrow
    for row in narrow:
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
        assert 2 * row["shared"] <= 227 * 1024, row


if __name__ == "__main__":
    print(json.dumps(compile_all({80: CASES, 90: CASES + HOPPER, 100: CASES})))
