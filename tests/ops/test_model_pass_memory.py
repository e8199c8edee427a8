"""Tests that the ops of the model's own pass never have in memory the sampled values of all points."""

from __future__ import annotations

import checks
import pytest
import relative_inputs
import torch
from calls import runs
from deformable import make

from benchmarks import measure

MIB = 1 << 20
LEVELS = [(50, 60), (25, 30), (13, 15), (7, 8)]

_INPUTS = """
def make(levels):
    count = sum(h * w for h, w in levels)
    shapes = [(count, 8, 32), (count, 4, 2), (count, 8, 4, 4, 2), (count, 8, 4, 4)]
    return [levels, *(torch.rand(1, *shape).requires_grad_({grad}) for shape in shapes)]
small, large = make([(8, 9), (4, 5), (2, 3), (1, 2)]), make({levels})
"""


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_deformable_attention(mode):
    """The sampled values of this call would be 63 MiB. In the backward pass the gradient of the output, 4 MiB, is made
    dense, a head's sums are in float32, and each head's share of the reference points' gradient is kept."""
    runs("cpu", "cpu")
    forward = "y = ops.deformable_attention(value, levels, *rest, impl='cpu')"
    backward = "return y.detach(), *torch.autograd.grad(y.sum(), (value, *rest))"
    extra = checks.extra_memory(
        prepare=_INPUTS.format(grad=mode == "bwd", levels=LEVELS),
        arguments="levels, value, *rest",
        run=f"{forward}; {backward if mode == 'bwd' else 'return y,'}",
        small="*small",
        large="*large",
    )
    assert extra <= (2 if mode == "fwd" else 8) * MIB


def test_composed_deformable_attention():
    """Those of one level, 16 MiB, and einsum's copy of them; beside it three sums of 4, the result among them."""
    call = make(1, tuple(LEVELS), 4001, 8, 32, 4)
    assert measure.peak_mib(lambda: call("composed"), "cpu") <= 48


_BI_INPUTS = """
def make(n, length):
    text_mask, image_mask = torch.rand(1, length) < 0.2, torch.rand(1, n) < 0.2
    sides = [torch.randn(1, tokens, 8, 8).requires_grad_({grad}) for tokens in (n, length, n, length)]
    return text_mask, image_mask, *sides
small, large = make(100, 10), make({n}, {length})
"""


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_bi_attention(mode):
    """The logits of this call would be 128 MiB. In the backward pass the gradients of both outputs, 4 MiB, are made
    dense, and each chunk of the image keeps what it adds to those of the text."""
    runs("cpu", "cpu")
    forward = "y = ops.bi_attention(*sides, *masks, impl='cpu')"
    backward = "return *(x.detach() for x in y), *torch.autograd.grad(sum(x.sum() for x in y), sides)"
    extra = checks.extra_memory(
        prepare=_BI_INPUTS.format(grad=mode == "bwd", n=16384, length=256),
        arguments="*arguments",
        run=f"masks, sides = arguments[:2], arguments[2:]; {forward}; {backward if mode == 'bwd' else 'return y'}",
        small="*small",
        large="*large",
    )
    assert extra <= (8 if mode == "fwd" else 24) * MIB


_WINDOW_INPUTS = """
def make(height, width):
    shapes = [(1, height, width, 3, 32)] * 3 + [(3, 49, 49), (3, 32), (3, 32)]
    dout = torch.randn(1, height, width, 96)
    return dout, *(torch.randn(shape).requires_grad_({grad}) for shape in shapes)
small, large = make(10, 10), make(201, 267)
"""


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_window_attention(mode, shift):
    """q alone is 20 MiB, and so would be a copy that is rolled, filled up or partitioned; the scores would be 30."""
    runs("cpu", "cpu")
    forward = f"y = ops.window_attention(*t[:4], 7, shift={shift}, pad_key=t[4], pad_value=t[5], impl='cpu')"
    backward = "return y.detach(), *torch.autograd.grad(y, t, dout)"
    extra = checks.extra_memory(
        prepare=_WINDOW_INPUTS.format(grad=mode == "bwd"),
        arguments="dout, *t",
        run=f"{forward}; {backward if mode == 'bwd' else 'return y,'}",
        small="*small",
        large="*large",
    )
    assert extra <= (2 if mode == "fwd" else 10) * MIB


_RELATIVE_INPUTS = """
def make(height, width, size):
    shapes = [(1, height, width, 4, 32)] * 3 + [(2 * (size or side) - 1, 32) for side in (height, width)]
    dout = torch.randn(1, height, width, 128)
    return dout, size, *(torch.randn(shape).requires_grad_({grad}) for shape in shapes)
small, large = make(6, 6, {window}), make(48, 50, {window})
"""


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_relative_attention(mode, window):
    """The scores of the map would be 88 MiB, those of its windows 30, and the bias as much again; q alone is 1.2 MiB.
    Parts of the queries have sums of their own in the backward pass."""
    runs("cpu", "cpu")
    forward = "y = ops.relative_attention(*t, window=window, impl='cpu')"
    backward = "return y.detach(), *torch.autograd.grad(y, t, dout)"
    extra = checks.extra_memory(
        prepare=_RELATIVE_INPUTS.format(grad=mode == "bwd", window=window),
        arguments="dout, window, *t",
        run=f"{forward}; {backward if mode == 'bwd' else 'return y,'}",
        small="*small",
        large="*large",
    )
    assert extra <= (6 if mode == "fwd" else 24) * MIB


@pytest.mark.parametrize("window", [None, 24])
def test_composed_relative_attention(window):
    """The scores of a few queries, forward and backward."""
    call = relative_inputs.make(1, 48, 50, 4, 32, window)
    dout = (torch.ones(1, 48, 50, 128),)
    assert measure.peak_mib(lambda: call.leaves().results("composed", dout), "cpu") <= 40
