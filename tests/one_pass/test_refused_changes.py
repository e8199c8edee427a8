"""Tests changes of a runner's model that are refused: the message says what to do, and doing that is enough."""

from __future__ import annotations

import peft
import pytest
import torch
from adapted_models import EXACT, LAYER, SITES, assert_equal, build_adapted, inputs, loop, lora, vit
from torch import nn
from torch.nn.utils import parametrize

import fastcss


def merge(model):
    model.merge_adapter(["task1"])


def add(model):
    model.add_adapter("new", peft.LoraConfig(r=2, target_modules=SITES[vit]))


def delete(model):
    model.delete_adapter("task1")


def disable(model):
    model.base_model.disable_adapter_layers()


def half_made(model):
    """Leave what PEFT leaves when add_adapter meets a layer that it has no LoRA for."""
    model.get_base_model().pooler.register_module("odd", nn.LayerNorm(3))
    with pytest.raises(ValueError, match="not supported"):
        model.add_adapter("new", peft.LoraConfig(r=2, target_modules=["q_proj", "odd"]))


def delete_half(model):
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.delete_adapter("new")


def parametrized(model):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(lora(model).lora_B["task1"], "weight", Double())


def replaced_forward(model):
    layer = lora(model)
    layer.forward = lambda x: x


def hook_inside(part):
    def add_hook(model):
        part(lora(model)).register_forward_hook(lambda *_: None)

    return add_hook


REFUSED = {
    "merged": (merge, lambda m: m.unmerge_adapter(), rf"{LAYER}.*merged.*unmerge_adapter\(\)"),
    "added": (add, None, r"task2, new now.*runner.refresh\(\)"),
    "deleted": (delete, None, r"task0, task2 now.*runner.refresh\(\)"),
    "disabled": (disable, lambda m: m.base_model.enable_adapter_layers(), f"{LAYER}.*enable_adapters"),
    "half-made": (half_made, delete_half, "layers.*adapter .new.*half-way"),
    "parametrized": (
        parametrized,
        lambda m: parametrize.remove_parametrizations(lora(m).lora_B["task1"], "weight"),
        f"{LAYER}.*lora_B.task1 is parametrized",
    ),
    "replaced forward": (replaced_forward, lambda m: vars(lora(m)).pop("forward"), f"{LAYER}.*replaced forward"),
    **{
        f"hook on {name}": (
            hook_inside(part), lambda m, part=part: part(lora(m))._forward_hooks.clear(), f"{LAYER}.*has hooks"
        )
        for name, part in {
            "lora_A": lambda layer: layer.lora_A["task1"],
            "lora_B": lambda layer: layer.lora_B["task0"],
            "dropout": lambda layer: layer.lora_dropout["task1"],
            "base_layer": lambda layer: layer.base_layer,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_what_changes_the_tasks_is_refused_with_the_remedy(what):
    change, mend, message = REFUSED[what]
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model)
    before = runner(**given)
    change(model)
    for _ in range(2):  # as long as it is so
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            runner(**given)
    if mend is None:
        runner.refresh()
        assert runner.adapters == tuple(model.peft_config)
    else:
        if what not in ("disabled",):
            with pytest.raises((TypeError, ValueError), match=message.split(".*")[0]):
                fastcss.one_pass(model)
        mend(model)
    got = runner(**given)
    assert_equal(got, loop(model, given))
    if mend is not None and what != "parametrized":
        torch.testing.assert_close(got[0], before[0], atol=EXACT, rtol=0)
