"""Tests training through the runner: gradients, dropout and running statistics must be those of the loop."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted_models import (
    EXACT,
    adapt,
    assert_equal,
    build_adapted,
    clip_text,
    grounding_dino,
    inputs,
    loop,
    resnet,
    vit,
)
from torch import nn
from torch.utils import _pytree as pytree

import fastcss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return got


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize(  # training a ResNet updates running statistics, which has a test of its own
    ("build", "mode"),
    [(b, m) for b in (grounding_dino, vit, clip_text) for m in ("train", "eval")] + [(resnet, "eval")],
)
def test_gradients_equal_the_loop(build, mode, engine):
    model, given = build_adapted(build), inputs(build, 2)
    model.train(mode == "train")
    for name, parameter in model.named_parameters():  # some of the base model's weights train along
        parameter.requires_grad_("lora_" in name or "norm" in name)
    runner = fastcss.one_pass(model, engine=engine)
    weight = None

    def loss(output, t: int) -> torch.Tensor:
        nonlocal weight
        weight = torch.randn(3, *output[0].shape, generator=torch.Generator().manual_seed(5))
        return (output[0] * weight[t]).mean()

    for t, name in enumerate(runner.adapters):
        model.set_adapter(name)
        loss(model(**given), t).backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "norm" in name)
    expected = gradients(model)
    output = runner(**given)
    sum(loss(pytree.tree_map(lambda leaf, t=t: leaf[t], output), t) for t in range(3)).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert sum("task1" in name for name in got) > 3
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=EXACT * max(1, float(gradient.abs().max())), rtol=0)


def test_a_task_reaches_only_its_own_adapter():
    model, given = build_adapted(vit), inputs(vit)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fastcss.one_pass(model)(**given).last_hidden_state[1].square().mean().backward()
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) == ("task1" in name), name


@pytest.mark.parametrize("build", [nn.Linear, nn.Conv2d])
def test_dropout_is_on_the_adapters_alone(build):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8) if build is nn.Linear else nn.Conv2d(64, 8, 1)
    sites = {"target_modules": ["0"]}
    model = adapt(nn.Sequential(layer), {"r": 4, **sites, "lora_dropout": 0.5}, {"r": 4, **sites})
    runner = fastcss.one_pass(model)
    x = torch.randn(1, 64) if build is nn.Linear else torch.randn(1, 64, 1, 1)
    with torch.no_grad():
        exact = runner(x)
        model.train()
        many = runner(x.expand(20_000, *x.shape[1:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape))  # drops nothing
            kept = runner(x)
        bare = layer.base_layer(x) if hasattr(layer, "base_layer") else model.get_base_model()[0].base_layer(x)
    torch.testing.assert_close(many[1], exact[1].expand_as(many[1]), atol=EXACT, rtol=0)
    spread = many[0].flatten(1).std(0)
    assert (spread > 0.05 * (exact[0] - bare).abs().flatten()).all()
    assert ((many[0].flatten(1).mean(0) - exact[0].flatten()).abs() < 5 * spread / 20_000**0.5).all()
    torch.testing.assert_close(kept[0] - bare, 2 * (exact[0] - bare), atol=EXACT, rtol=0)


def test_batch_norm_in_training_runs_in_turn():
    """Each task's pass must update the running statistics, as the loop does."""
    model, given = build_adapted(resnet), inputs(resnet, 2)
    other = copy.deepcopy(model)
    runner = fastcss.one_pass(model)
    model.train(), other.train()
    with pytest.warns(UserWarning, match="running statistics"):
        assert_equal(runner(**given), loop(other, given))
    assert runner.engine == "replay"
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(**given)
    assert runner.engine == "vmap"


def test_one_warning_names_the_adapters_that_do_not_train():
    model, given = build_adapted(vit), inputs(vit)
    model.train()
    runner = fastcss.one_pass(model)
    with pytest.warns(UserWarning, match=r"adapters task1, task2 get no gradients.*set_requires_grad"):
        runner(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(**given)
        fastcss.one_pass(model)(**given, adapters=["task0"])
        model.set_requires_grad(["task1", "task2"])
        fastcss.one_pass(model)(**given)
        model.set_adapter("task1")
        model.eval()
        fastcss.one_pass(model)(**given)
