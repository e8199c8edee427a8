"""Tests what becomes of ``set_scale`` when the runner's adapters or their kinds change later."""

from __future__ import annotations

import peft
import torch
from adapted_models import adapt, assert_equal, inputs, loop, vit

import fastcss

SITES = ["q_proj", "v_proj"]


@torch.no_grad()
def test_another_adapter_of_a_gone_ones_name_has_its_own_scale():
    torch.manual_seed(0)
    model, given = adapt(vit(), *({"r": r, "target_modules": SITES} for r in (4, 3))), inputs(vit)
    runner = fastcss.one_pass(model)
    runner.set_scale("task1", 0.5)
    model.delete_adapter("task1")
    runner.refresh()
    model.add_adapter("task1", peft.LoraConfig(r=2, target_modules=SITES, init_lora_weights=False))
    model.eval()
    runner.refresh()
    assert_equal(runner(**given), loop(model, given))
