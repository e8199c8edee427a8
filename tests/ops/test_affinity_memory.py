"""Tests what the affinity ops promise never to have in memory: an N×N map, a softmaxed map, intra and inter."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import Call, normal, runs

from benchmarks import measure
from fastcss import ops


def test_affinity_attention():
    """q kᵀ of this call is 256 MiB, and so would 1 − M be."""
    runs("cpu", "cpu")
    backward = "y = call(*t); return *(x.detach() for x in y), *torch.autograd.grad(sum(x.sum() for x in y), t)"
    extra = checks.extra_memory(
        prepare="def make(n):\n"
        "    return [torch.randn(1, n, d).requires_grad_() for d in (16, 16, 21)]\n"
        "def call(*t):\n"
        "    return ops.affinity_attention(*t, mean=True, impl='cpu')\n"
        "small, large = make(512), make(8192)",
        arguments="*t", run=backward, small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 16 << 20


@pytest.mark.parametrize(("mode", "mib"), [("fwd", 8), ("bwd", 32)])
def test_class_affinity(mode, mib):
    """An N×N map of this call is 64 MiB, intra and inter with their gradients are 32."""
    runs("cpu", "cpu")
    forward = "y = ops.class_affinity(*t, mean=True, impl='cpu')"
    backward = "return *(x.detach() for x in y), *torch.autograd.grad(sum(x.sum() for x in y), t)"
    extra = checks.extra_memory(
        prepare="def make(n):\n"
        "    sizes = ((n, 64), (n, 64), (n, 512), (150, 512))\n"
        f"    return [torch.randn(1, *s).requires_grad_({mode == 'bwd'}) for s in sizes]\n"
        "small, large = make(256), make(4096)",
        arguments="*t", run=f"{forward}; {backward if mode == 'bwd' else 'return y'}", small="*small", large="*large",
    )  # fmt: skip
    assert extra <= mib << 20


def test_affinity_loss():
    """A training step at N = 16,384, of which one N×N map in float32 is 1 GiB."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(n):\n"
        "    return *(torch.randn(1, n, 16).requires_grad_() for _ in range(2)), torch.randint(21, (1, n))\n"
        "small, large = make(512), make(16384)",
        arguments="q, k, labels",
        run="y = ops.affinity_loss(q, k, labels, impl='cpu'); return y.detach(), *torch.autograd.grad(y, (q, k))",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 32 << 20


def test_composed_affinity_loss():
    """It must never hold a map of N×N, here 36 MiB (memory that the C library keeps is not counted)."""
    q, k = (normal(1, 3072, 16, seed=i) for i in (0, 1))
    labels = torch.zeros(1, 3072, dtype=torch.int64)
    call = Call(ops.affinity_loss, {"q": q, "k": k}, {"labels": labels}).leaves()
    dys = (torch.ones(()),)
    assert measure.peak_mib(lambda: call.results("composed", dys), "cpu") <= 18


@pytest.mark.parametrize("over", ["pixels", "classes"])
def test_class_centers(over):
    """Forward: the softmaxed map of this call would be 38 MiB."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(n):\n"
        "    return torch.randn(1, 150, n), torch.randn(1, n, 32)\n"
        "small, large = make(512), make(65536)",
        arguments="*t",
        run=f"return ops.class_centers(*t, over='{over}', impl='cpu'),",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 8 << 20
