"""top_classes: every implementation × dtype × shape, to the bit what a stable sort gives."""

from __future__ import annotations

import math

import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, normal
from left_out import light
from torch import Tensor

from fastcss.ops import top_classes

SHAPES = [(1, 1, 1), (0, 5, 3), (3, 2, 1), (2, 33, 33), (5, 20, 100), (3, 847, 32), (2, 1030, 257)]
LARGE = [(2, 5000, 600), (1, 20000, 32)]


def assert_top(score: Tensor, k: int, impl: str) -> None:
    """Check against the equation: float64 holds every score, and Python's sort keeps equal ones in order."""
    values, index = top_classes(score, k, impl=impl)
    assert (values.dtype, index.dtype) == (score.dtype, torch.int64)
    want = [sorted(range(len(row)), key=lambda c, row=row: _rank(row[c]))[:k] for row in score.double().tolist()]
    assert index.tolist() == want
    assert index.shape == values.shape == (len(score), min(k, score.shape[1]))
    torch.testing.assert_close(values, score.gather(1, index), rtol=0, atol=0, equal_nan=True)


def _rank(value: float) -> tuple[bool, float]:
    return (False, 0.0) if math.isnan(value) else (True, -value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda shape, dtype: shape[1] < 900 and (dtype == torch.float32 or shape[1] == 33))
def test_values_and_classes(impl, shape, dtype, device):
    """Many scores are equal in 16 bits, and must keep their order."""
    *shape, k = shape
    assert_top(normal(*shape, dtype=dtype, device=device), k, impl)


@pytest.mark.parametrize("k", [1, 7, 40, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda dtype, k: dtype != torch.float16 or k == 7)
def test_ties_nan_and_infinities(impl, dtype, k, device):
    """Few values; zeros of either sign are equal; NaN of either sign is above all."""
    levels = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan, -math.nan])
    picks = torch.randint(8, (6, 150), generator=torch.Generator().manual_seed(0))
    picks[1] = picks[1] % 6  # no NaN
    picks[2] = 0
    picks[3] = 6
    picks[4, 3:] = 2 + picks[4, 3:] % 2
    picks[5] = 4
    assert_top(levels[picks].to(device, dtype), k, impl)


@pytest.mark.parametrize("order", ["rising", "falling", "one apart", "the last bit"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda order: order in ("rising", "the last bit"))
def test_rows_that_are_hard_to_cut(impl, order, device):
    """All in order, or alike but for one or but for the last bit: a threshold or a digit tells them apart late."""
    score = torch.arange(700.0) + 1
    if order == "falling":
        score = score.flip(0)
    elif order == "one apart":
        score = torch.ones(700).index_fill(0, torch.tensor(650), 2.0)
    elif order == "the last bit":
        score = (
            (torch.randint(4, (700,), generator=torch.Generator().manual_seed(0)) + 0x3F800000)
            .to(torch.int32)
            .view(torch.float32)
        )
    for k in (1, 32, 699, 700):
        assert_top(torch.stack([score, -score]).to(device), k, impl)


@pytest.mark.parametrize("layout", ["NCHW", "every second column", "a slice", "expanded batch"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_any_strides(impl, layout, device):
    assert_top(LAYOUTS[layout](normal(4, 90, device=device)), 17, impl)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_reproducible_and_of_its_row_alone(impl, device):
    score = normal(3, 847, device=device)
    together = top_classes(score, 32, impl=impl)
    for rows in (slice(0, 3), slice(0, 1), slice(1, 2), slice(2, 3)):
        for one, other in zip(top_classes(score[rows], 32, impl=impl), together, strict=True):
            assert torch.equal(one, other[rows])


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck_and_vmap(impl, device):
    for shape, k in (((2, 33), 5), ((0, 3), 2), ((1, 4), 4)):
        checks.opcheck("top_classes", impl, normal(*shape, device=device), k)
    score = normal(2, 3, 40, device=device)
    want = [torch.stack(parts) for parts in zip(*(top_classes(row, 4, impl=impl) for row in score), strict=True)]
    for got, expected in zip(torch.vmap(lambda s: top_classes(s, 4, impl=impl))(score), want, strict=True):
        assert torch.equal(got, expected)


def test_carries_no_gradient(device):
    score = normal(2, 40, device=device).requires_grad_()
    assert not top_classes(score, 3)[0].requires_grad
