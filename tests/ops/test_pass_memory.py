"""What the ops of the model's own pass promise never to have in memory: the sampled values of all points."""

from __future__ import annotations

import checks
import pytest
from calls import runs
from deformable import make

from benchmarks import measure
from fastcss import ops

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
    runs(ops.deformable_attention, "cpu", "cpu")
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
