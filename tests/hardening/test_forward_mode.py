"""Tests that every kernel refuses forward mode: torch would give zeros for tangents and dual numbers."""

from __future__ import annotations

import pytest
from small_calls import ERRORS, SHAPES, function
from torch.autograd import forward_ad
from torch_transforms import compiled, left_as_found, tangent

DIFFERENTIABLE = [op for op in SHAPES if op not in ("merge_masks", "topk_queries", "top_classes")]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_tangents_of_a_kernel_are_refused(op, compile):
    """A kernel that is asked for must refuse tangents by name; torch would give zeros."""
    f, tensors = function(op, "cpu")
    run = tangent(f, tensors)
    with (
        left_as_found(),
        pytest.raises(Exception, match=rf"{ERRORS.get(op, op.split()[0])}: .*no forward-mode .*impl='composed'"),
    ):
        (compiled(run, tensors) if compile else run)(*tensors)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_dual_numbers_of_a_kernel_are_refused(op):
    """Dual numbers must be refused without torch.func, too, whose levels the test above has."""
    f, tensors = function(op, "cpu")
    name = ERRORS.get(op, op.split()[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"{name}: .*no forward-mode"):
        f(*(forward_ad.make_dual(t, t) if t.is_floating_point() else t for t in tensors))
