"""Tests torch's count of the raw ops' FLOPs against figures by hand, with the products that a backward recomputes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcss import ops
from fastcss._dispatch import backends

q, cls, logits = (torch.randn(2, 5, 3), torch.randn(2, 7), torch.randn(2, 4, 5))
labels, phrases = torch.zeros(2, 5, dtype=torch.int64), torch.randn(3, 4, 7)
#: A call, and the FLOPs of it and of its backward pass.
CALLS = {
    "affinity_loss": (lambda q: ops.affinity_loss(q, q, labels, impl="cpu"), q, 2 * 2 * 25 * 3, 3 * 2 * 2 * 25 * 3),
    "affinity_attention": (
        lambda q: sum(ops.affinity_attention(q, q, q, impl="cpu")), q, 2 * 2 * 25 * (3 + 3), 2 * 2 * 25 * (9 + 6),
    ),
    "class_centers": (lambda q: ops.class_centers(logits, q, impl="cpu"), q, 2 * 2 * 4 * 5 * 3, 4 * 2 * 4 * 5 * 3),
    "relative_attention": (
        lambda q: ops.relative_attention(q, q, q, q[0, 0, :1, 0].expand(3, 3), q[0, 0, 0, :1], impl="cpu"),
        torch.randn(2, 2, 1, 1, 3), 4 * 12 * 2 + 2 * 12 * 3, 10 * 12 * 2 + 6 * 12 * 3,
    ),
    "phrase_pool": (lambda cls: ops.phrase_pool(cls, phrases, impl="cpu"), cls, 4 * 2 * 84, 10 * 2 * 84),
}  # fmt: skip


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="no compiled CPU kernels here")
@pytest.mark.parametrize("op", CALLS)
def test_flops(op):
    call, x, forward, backward = CALLS[op]
    with FlopCounterMode(display=False) as counter:
        y = call(x.clone().requires_grad_())
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == backward
