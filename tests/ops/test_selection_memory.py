"""Tests what the cost filter and the selection ops promise never to have in memory: a cost map of all classes, logits
of all tokens and classes, gathered weights, full-size masks, another copy of the logits."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import normal, runs

from benchmarks import measure
from fastcss import ops

MIB = 1 << 20


@pytest.mark.parametrize(("batch", "classes", "prompts"), [(5, 847, 1), (1, 150, 80)])
def test_cost_filter(batch, classes, prompts):
    """The cost map of these would be 9 and 26 MiB; the maps of the k kept classes, the result, are not counted."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(b, t, p):\n"
        "    text = ops.pack_text(torch.randn(t, p, 512), impl='cpu')\n"
        "    return torch.randn(b, 24, 24, 512), text\n"
        f"small, large = make(1, 40, 1), make({batch}, {classes}, {prompts})",
        arguments="image, text",
        run="return tuple(ops.cost_filter(image, text, 32, impl='cpu'))",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 4 * MIB


def test_composed_cost_filter():
    """The cost map of this call is 33 MiB; rows of length one are a copy of the inputs, 12 MiB."""
    image, text = normal(5, 24, 24, 512), normal(3000, 1, 512)
    assert _composed(ops.cost_filter, image, text, 32) <= 20


def test_select_tokens():
    """The cosines of this call would be 7 MiB, its tokens in rows of length one 17."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(n, c):\n"
        "    return torch.randn(1, n, 256), torch.randn(1, c, 256)\n"
        "small, large = make(400, 100), make(17821, 100)",
        arguments="*t",
        run="return tuple(ops.select_tokens(*t, threshold=0.1, length=1024, impl='cpu'))",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 2 * MIB


_PROMPTS = (
    "def make(k):\n"
    "    sizes = ((512, 512), (512,), (512, 768), (768,))\n"
    "    return [torch.randn(k, 2, *s)[:, 0].requires_grad_({grad}) for s in sizes]\n"
    "z, index = torch.randn(20, 512).requires_grad_({grad}), torch.arange(20)\n"
    "small, large = make(20), make(20)"
)


@pytest.mark.parametrize("mode", ["fwd", "dz"])
def test_prompt_mlp(mode):
    """The weights of its 20 classes are 50 MiB, the classes not next to each other."""
    runs("cpu", "cpu")
    forward = "y = ops.prompt_mlp(z, *w, index, impl='cpu')"
    backward = "dz, = torch.autograd.grad(y.sum(), z); return y.detach(), dz"
    extra = checks.extra_memory(
        prepare=_PROMPTS.replace("requires_grad_({grad})", "requires_grad_(False)", 1).format(grad=mode == "dz"),
        arguments="*w", run=f"{forward}; {backward if mode == 'dz' else 'return y,'}", small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 2 * MIB


def test_composed_prompt_mlp():
    """Its weights are 50 MiB."""
    weights = [normal(20, *s) for s in ((512, 512), (512,), (512, 768), (768,))]
    assert _composed(ops.prompt_mlp, normal(20, 512), *weights, torch.arange(20)) <= 2


@pytest.mark.parametrize("score", [False, True])
def test_merge_masks(score):
    """All of its masks in full size would be 600 MiB, one of them 4; the label map is 8."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(k):\n"
        "    return torch.randn(k, 256, 256), torch.rand(k)\n"
        "small, large = make(2), make(150)",
        arguments="masks, scores",
        run=f"y = ops.merge_masks(masks, scores, (1024, 1024), return_score={score}, impl='cpu')\n"
        f"    return {'y' if score else 'y,'}",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 2 * MIB


def test_composed_merge_masks():
    """Two full-size masks, two label maps, two maps of scores, at 1 MiB a mask here."""
    assert _composed(ops.merge_masks, normal(20, 128, 128), torch.rand(20), (512, 512)) <= 8


def test_topk_queries():
    """The logits of this call would be 19 MiB."""
    runs("cpu", "cpu")
    extra = checks.extra_memory(
        prepare="def make(n):\n"
        "    return torch.randn(4, n, 256), torch.randn(150, 256)\n"
        "small, large = make(200), make(8400)",
        arguments="*t",
        run="return tuple(ops.topk_queries(*t, 100, impl='cpu'))",
        small="*small", large="*large",
    )  # fmt: skip
    assert extra <= 2 * MIB


def test_composed_topk_queries():
    assert _composed(ops.topk_queries, normal(4, 8400, 64), normal(150, 64), 100) <= 4


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_top_margin(mode):
    """The logits of this call are 37 MiB, and so is their gradient, which is a result. What the backward pass wants
    saved is 12 bytes a pixel."""
    runs("cpu", "cpu")
    forward = "y = ops.top_margin(z, impl='cpu')"
    backward = "dz, = torch.autograd.grad(y.margin.sum() + y.curvature.sum(), z); return *(x.detach() for x in y), dz"
    extra = checks.extra_memory(
        prepare=f"small, large = (torch.randn(1, 150, n, n).requires_grad_({mode == 'bwd'}) for n in (32, 256))",
        arguments="z",
        run=f"{forward}; {backward if mode == 'bwd' else 'return tuple(y)'}",
        small="small",
        large="large",
    )
    assert extra <= 4 * MIB


def test_composed_top_margin():
    """Its logits are 37 MiB, what it returns is 2."""
    assert _composed(ops.top_margin, normal(1, 150, 256, 256)) <= 10


def test_composed_top_margin_backward():
    """The gradient of 37 MiB is in memory once, beside the pieces that it is put together from."""
    logits = normal(1, 150, 256, 256).requires_grad_()

    def step():
        y = ops.top_margin(logits, impl="composed")
        return torch.autograd.grad(y.margin.sum() + y.curvature.sum(), logits)

    assert measure.peak_mib(step, "cpu") <= 85


def _composed(op, *arguments) -> float:
    """Most MiB that torch held at a time."""
    return measure.peak_mib(lambda: op(*arguments, impl="composed"), "cpu")
