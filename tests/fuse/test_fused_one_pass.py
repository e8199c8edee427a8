"""A fused model in the one-pass runner, against PEFT's loop over the model as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from fused_models import assert_equal, encoder, encoder_inputs

import fastcss
from fastcss._dispatch import backends
from fastcss._dispatch.torch_function import one_call
from fastcss._fuse.fusion import fuse_modules
from fastcss.models.grounding_dino import LORA_SITES, add_adapters

TASKS = 3


def loop(model, given: dict) -> list:
    outputs = []
    for name in model.peft_config:
        model.set_adapter(name)
        outputs.append(model(**given))
    return outputs


def assert_each(got, expected: list) -> None:
    for task, wanted in enumerate(expected):
        assert_equal([tensor[task] for tensor in got.values()], list(wanted.values()))


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("sites", LORA_SITES)
@pytest.mark.parametrize("options", [{}, {"engine": "vmap", "group_size": 2}, {"engine": "replay"}], ids=str)
@torch.no_grad()
def test_equals_the_loop(options, sites, linears):
    model, given = add_adapters(encoder(), TASKS, rank=4, sites=sites), encoder_inputs(2)
    expected = loop(model, given)
    fuse_modules(model, linears)
    runner = fastcss.one_pass(model, **options)
    assert_each(runner(**given), expected)
    assert runner.engine == options.get("engine", "vmap")


@pytest.mark.parametrize("impl", ["auto", "composed"])
@torch.no_grad()
def test_vmap_needs_no_slow_fallback(impl, monkeypatch):
    """No form of the ops, composed ones included, may need vmap's loop over the tasks."""
    model, given = add_adapters(encoder(), TASKS, rank=4, sites="swin+fusion"), encoder_inputs(2)
    expected = loop(model, given)
    fastcss.fuse(model)
    if impl == "composed":
        monkeypatch.setattr(backends, "choose", lambda *_: "composed")
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_each(fastcss.one_pass(model, engine="vmap")(**given), expected)
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{"engine": "vmap", "group_size": 1}, {"engine": "replay"}], ids=str)
def test_what_no_adapter_touches_runs_once(options, grad, monkeypatch):
    """The groups of tasks share Swin if only the fusion layers are adapted: a fused op must not end what they share."""
    model, given, calls = add_adapters(encoder(), TASKS, rank=4, sites="fusion"), encoder_inputs(1), []
    given["pixel_values"].requires_grad_(grad)
    fastcss.fuse(model)
    for family, name in (("swin", "window_attention"), ("bi_attention", "bi_attention")):
        op = getattr(fastcss.ops, name)

        def counted(*args, op=op, name=name, **kwargs):
            calls.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(f"fastcss._fuse.{family}.{name}", one_call(counted))
    with torch.set_grad_enabled(grad):
        assert fastcss.one_pass(model, **options)(**given)[0].requires_grad is grad
    assert (calls.count("window_attention"), calls.count("bi_attention")) == (4, 2 * TASKS)


def test_training():
    model, given = add_adapters(encoder(), 2, rank=4, sites="fusion"), encoder_inputs(1)
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_()

    def gradients(outputs: list) -> list:
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for out in outputs for o in out)
        return list(torch.autograd.grad(loss, weights))

    expected = []
    for name in list(model.peft_config):
        model.set_adapter(name)
        for weight in weights:
            weight.requires_grad_()
        expected.append(list(model(**given).values()))
    expected = gradients(expected)
    fastcss.fuse(model)
    output = fastcss.one_pass(model, engine="vmap")(**given)
    got = gradients([[tensor[task] for tensor in output.values()] for task in range(2)])
    scale = max(e.norm() for e in expected)
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6 * scale
