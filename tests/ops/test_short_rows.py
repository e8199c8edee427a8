"""Rows shorter than 1e-12 count as that long in every cosine, and their gradients are those of a division by it."""

from __future__ import annotations

import pytest
import torch
from calls import IMPLEMENTATIONS, IMPLEMENTATIONS_CUDA, Call, normal, runs
from torch import Tensor

from fastcss.ops import cost_filter, phrase_pool, select_tokens

CALLS = {
    "cost_filter": Call(cost_filter, {"image": normal(1, 2, 3, 8), "text": normal(1, 5, 2, 8, seed=1)}, {"k": 5}),
    "phrase_pool": Call(phrase_pool, {"cls": normal(3, 8), "phrases": normal(3, 4, 8, seed=1)}),
    "select_tokens": Call(
        select_tokens,
        {"tokens": normal(1, 7, 8), "classes": normal(1, 3, 8, seed=1)},
        {"threshold": -1.0, "length": 64},
    ),
}
CASES = [(op, impl) for op in CALLS for impl in (IMPLEMENTATIONS_CUDA if op == "select_tokens" else IMPLEMENTATIONS)]


def shortened(tensor: Tensor, length: float) -> Tensor:
    """``tensor``, whose second row is as short as that: a direction with a share of the others' cosines."""
    rows = tensor.flatten(0, -2).clone()
    rows[1] *= length / rows[1].norm()
    return rows.view_as(tensor)


@pytest.mark.parametrize("length", [3e-12, 9e-13, 1e-13])
@pytest.mark.parametrize(("op", "impl"), CASES)
def test_gradients(op, impl, length, device):
    call = CALLS[op].map(lambda tensor: shortened(tensor, length).to(device))
    dys = call.output_gradients()
    exact = call.leaves(torch.float64).results("reference", dys)
    got = call.leaves().results(runs(impl, device), dys)
    for name, wanted in exact.items():
        rows, right = (t.double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (got[name], wanted))
        error = (rows - right).norm(dim=1) / right.norm(dim=1).clamp_min(1e-6)  # of each row by itself
        assert error.max() < 1e-4, f"{name}: row {error.argmax().item()} is off by {error.max():.1e} of its length"
