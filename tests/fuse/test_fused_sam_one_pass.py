"""SAM's fused image encoder in the one-pass runner, against PEFT's loop over the model as it was."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from fused_models import assert_equal
from sam_models import SIDE, build
from torch import Tensor, nn

import fastcss
from fastcss._fuse.fusion import fuse_modules

TASKS = 3
SITES = {"qkv": ["qkv"], "all": ["qkv", "proj", "lin1", "lin2", "fc1", "fc2"]}


def adapted(kind: str, sites: str, tasks: int = TASKS) -> nn.Module:
    model, targets = build(kind), SITES[sites]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config, "task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", config)
    return model.eval()


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(0))


def loop(model: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = []
    for name in model.peft_config:
        model.set_adapter(name)
        outputs.append(model(x).last_hidden_state)
    return outputs


@pytest.mark.parametrize("options", [{}, {"engine": "vmap", "group_size": 2}, {"engine": "replay"}], ids=str)
@pytest.mark.parametrize(("kind", "sites"), [("sam", "qkv"), ("sam", "all"), ("vitdet", "all")])
@torch.no_grad()
def test_equals_the_loop(kind, sites, options):
    model, x = adapted(kind, sites), pictures()
    expected = loop(model, x)
    assert min((a - b).norm() / a.norm() for a, b in itertools.pairwise(expected)) > 1e-2
    runner = fastcss.one_pass(model, **options)
    assert list(runner.fusion.replaced.values()) == ["relative_attention"] * 3
    assert_equal(list(runner(x).last_hidden_state), expected)
    fuse_modules(model, linears=False)
    assert_equal(list(fastcss.one_pass(model, **options)(x).last_hidden_state), expected)
    assert_equal(loop(model, x), expected)


@pytest.mark.parametrize("options", [{"engine": "vmap"}, {"engine": "replay"}], ids=str)
def test_gradients(options):
    model, x = adapted("sam", "all", 2), pictures(1)
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
        return list(torch.autograd.grad(loss, weights))

    outputs = []
    for name in list(model.peft_config):
        model.set_adapter(name)
        for weight in weights:
            weight.requires_grad_()
        outputs.append(model(x).last_hidden_state)
    expected = gradients(outputs)
    got = gradients(list(fastcss.one_pass(model, **options)(x).last_hidden_state))
    scale = max(e.norm() for e in expected)
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6 * scale
