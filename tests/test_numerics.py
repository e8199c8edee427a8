"""Tests what docs/numerics.md says of the whole package."""

from __future__ import annotations

import re

import pytest
import torch
from documents import ROOT

from fastcss import PackedLora, multi_lora
from fastcss._dispatch import backends


def test_the_table_of_tolerances_is_that_of_the_tests(tolerances):
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.e-]+) \|", text, re.MULTILINE)
    assert {getattr(torch, name): float(value) for name, value in rows} == tolerances


@pytest.mark.parametrize("impl", ["composed", "cpu"])
def test_denormals_stay(impl):
    """Denormals must not become 0, on any thread, in the ops or around them."""
    if backends.UNAVAILABLE[impl]:
        pytest.skip(backends.UNAVAILABLE[impl])
    x = torch.full((64, 4096), 1e-40)  # enough for several threads
    lora = PackedLora.pack([torch.zeros(1, 4096)], [torch.zeros(1, 1)], [1.0])
    assert torch.equal(multi_lora(x, torch.eye(1, 4096), lora, impl=impl), x[None, :, :1])
    assert torch.equal(x * 0.5 + x * 0.5, x)


def test_tf32_only_where_torch_is_told_to():
    pytest.importorskip("triton")
    from fastcss.kernels.multi_lora import precision

    assert precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
def test_threads_do_not_change_multi_lora(mode, dtype):
    if backends.UNAVAILABLE["cpu"]:
        pytest.skip(backends.UNAVAILABLE["cpu"])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ranks, index = (4, 17, 0, 32), torch.tensor([2, 0, 3, -1]) if mode == "routed" else None
    x = normal(*(() if mode == "shared" else (4,)), 301, 137).requires_grad_()
    lora_a = [normal(rank, 137).requires_grad_() for rank in ranks]
    lora_b = [normal(129, rank).requires_grad_() for rank in ranks]
    weight, dy = normal(129, 137), normal(4, 301, 129)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = multi_lora(x, weight, PackedLora.pack(lora_a, lora_b, [0.5] * 4), mode=mode, index=index, impl="cpu")
            found.append([y.detach(), *torch.autograd.grad(y, [x, *lora_a, *lora_b], dy)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, first) for one, first in zip(other, found[0], strict=True))
