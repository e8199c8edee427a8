"""Tests that a TorchFunctionMode sees a fused op like a call of torch's own: whole, once, and kept like any other."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastcss import ops
from fastcss._one_pass.shared_work import SharedWork


def _deformable(**options):
    value, points = torch.randn(1, 20, 2, 8, **options), torch.rand(1, 5, 2, 2)
    offsets, logits = torch.randn(1, 5, 2, 2, 3, 2), torch.randn(1, 5, 2, 2, 3)
    return ops.deformable_attention, (value, [(4, 4), (2, 2)], points, offsets, logits), {}


def _bi(**options):
    q, k = torch.randn(1, 20, 2, 8, **options), torch.randn(1, 5, 2, 8)
    return ops.bi_attention, (q, k, q.detach(), k), {"text_mask": torch.zeros(1, 5, dtype=torch.bool), "scale": 0.5}


def _window(**options):
    q = torch.randn(1, 5, 6, 2, 8, **options)
    return (
        ops.window_attention,
        (q, q.detach(), q.detach(), torch.randn(2, 16, 16), 4),
        {"shift": 2, "pad_key": torch.ones(2, 8)},
    )


OPS = pytest.mark.parametrize("make", [_deformable, _bi, _window], ids=lambda make: make.__name__[1:])


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@OPS
@pytest.mark.parametrize("grad", [False, True])
def test_is_seen_whole(make, grad):
    op, args, kwargs = make(requires_grad=grad)
    expected = op(*args, **kwargs)
    outer, inner = Watch(), Watch()
    with outer, inner:
        got = op(*args, **kwargs)
    assert outer.seen == inner.seen == [op]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@OPS
@torch.no_grad()
def test_is_remembered(make):
    op, args, kwargs = make()
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    shared = SharedWork(tensors)
    with shared:
        first = op(*args, **kwargs)
    watch = Watch()
    with watch, shared:
        again = op(*args, **kwargs)
        other = op(tensors[0] + 1, *args[1:], **kwargs)
    assert watch.seen.count(op) == 1  # only the call for the other tensor
    results = first if isinstance(first, tuple) else (first,)
    assert all(a is f for a, f in zip(again if isinstance(again, tuple) else (again,), results, strict=True))
    assert all(map(shared.is_shared, results))
    assert not torch.equal(other[0], first[0])


@OPS
def test_subclasses_of_tensors_take_part(make):
    class Marked(torch.Tensor):
        pass

    op, args, kwargs = make()
    got = op(args[0].as_subclass(Marked), *args[1:], **kwargs)
    for g, e in zip(got, op(*args, **kwargs), strict=True):
        assert type(g) is Marked
        assert torch.equal(g.as_subclass(torch.Tensor), e)
