"""Tests what becomes of ``set_scale`` when the runner's adapters or their kinds change later."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapted_models import adapt, assert_equal, clip_text, inputs, loop, save, vit

import fastcss

SITES = ["q_proj", "v_proj"]
IN_TURN = ["ignore:.*one adapter at a time", "ignore:.*run in turn"]


def _rescale(model, adapter: str, factor: float) -> None:
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale(adapter, factor)


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


@pytest.mark.filterwarnings(*IN_TURN)
@torch.no_grad()
def test_a_scale_is_not_lost_where_layers_come_to_run_in_turn():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=SITES, init_lora_weights=False)
    model, given = peft.PeftMixedModel(vit(), config, "task0").eval(), inputs(vit)
    runner = fastcss.one_pass(model)
    runner.set_scale("task0", 0.5)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=SITES, init_weights=False))
    model.eval()
    for change in (lambda: runner.add("other"), runner.refresh):
        with pytest.raises(TypeError, match=r"q_proj'.*loha.*set_scale\('task0', 0\.5\) does not reach"):
            change()
        assert runner.adapters == ("task0",)
    model.delete_adapter("other")
    runner.set_scale("task0", 1)
    model.add_adapter("other", peft.LoHaConfig(r=3, target_modules=SITES, init_weights=False))
    model.eval()
    runner.add("other")
    assert_equal(runner(**given), loop(model, given, ["task0", "other"]))


@pytest.mark.filterwarnings(*IN_TURN)
@torch.no_grad()
def test_lora_that_peft_reads_beside_tokens_is_rescaled(tmp_path):
    torch.manual_seed(0)
    bare, given = clip_text().eval(), inputs(clip_text)
    tokens = {"target_modules": SITES, "trainable_token_indices": {"token_embedding": [1, 5]}}
    model = adapt(copy.deepcopy(bare), {"r": 4, **tokens}, {"r": 3, **tokens})
    runner = fastcss.one_pass.from_directories(bare, save(model, tmp_path, save_embedding_layers=False))
    runner.set_scale("task0", 0.5)
    _rescale(model, "task0", 0.5)
    assert_equal(runner(**given), loop(model, given))
    runner.remove("task1")
    torch.testing.assert_close(
        runner(**given).last_hidden_state[0], loop(model, given)[0].last_hidden_state, atol=1e-5, rtol=0
    )
