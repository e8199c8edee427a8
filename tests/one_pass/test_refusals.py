"""Tests what the runner refuses, and that it says why and leaves the model alone."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from adapted_models import adapt, assert_equal, assert_untouched, build_adapted, clip_text, inputs, loop, state_of, vit

import fastcss


def unsupported():
    """(what, model, what the error names)"""
    sites = {"r": 2, "target_modules": ["q_proj"]}
    yield "no adapters", vit, "ViTModel has no adapted layer"

    def merged():
        model = adapt(vit(), sites)
        model.merge_adapter()
        return model

    yield "merged", merged, "q_proj.*merged"
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])

    def merged_ia3():
        model = peft.get_peft_model(vit(), ia3)
        model.merge_adapter()
        return model

    yield "merged layers of another kind", merged_ia3, "q_proj.*merged"
    prompt = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    yield "prompt", lambda: peft.get_peft_model(clip_text(), prompt), "PROMPT_TUNING, which works around the model's"

    def hooked():
        model = adapt(vit(), sites)
        model.get_base_model().layers[0].attention.q_proj.base_layer.register_forward_hook(lambda *_: None)
        return model

    yield "hook", hooked, "layers.0.attention.q_proj' has hooks"

    def half_made(change):
        model = adapt(vit(), sites)
        with pytest.raises(ValueError, match="not supported"):
            model.add_adapter("left", peft.LoraConfig(r=2, target_modules=["q_proj", "layernorm_before"]))
        change(model)
        return model

    def without_b():
        model = adapt(vit(), sites)
        del model.get_base_model().layers[1].attention.q_proj.lora_B["task0"]
        return model

    def named_now(model):
        model.peft_config["left"] = model.peft_config["task0"]
        del model.get_base_model().layers[0].attention.q_proj.scaling["left"]

    half = r"adapter '{}': it {}.* call delete_adapter\('{}'\)"
    no_adapter = half.format("left", "is none of the model's adapters \\(task0\\)", "left")
    yield "half-made adapter", lambda: half_made(lambda _: None), "layers.0.attention.q_proj', " + no_adapter
    yield "adapter without B", without_b, "layers.1.*" + half.format("task0", "has no lora_B", "task0")
    yield "adapter without scale", lambda: half_made(named_now), half.format("left", "has no scaling", "left")

    def scaled():
        model = adapt(clip_text(), {"r": 2, "target_modules": ["token_embedding"]})
        model.get_base_model().get_input_embeddings().base_layer.embed_scale = 2.0
        return model

    yield "scaled embedding", scaled, "token_embedding' has an embed_scale"
    yield "bad engine", lambda: adapt(vit(), sites), "engine must be one of"


@pytest.mark.parametrize(("build", "message"), [pytest.param(b, m, id=w) for w, b, m in unsupported()])
def test_what_cannot_run_is_refused_by_name(build, message):
    model = build()
    before = state_of(model)
    with pytest.raises((TypeError, ValueError), match=message):
        fastcss.one_pass(model, engine="warp" if "engine" in message else "auto")
    assert_untouched(model, before)


@torch.no_grad()
def test_a_half_made_adapter_is_gone_when_it_is_deleted_as_the_message_says():
    model, given = build_adapted(vit), inputs(vit, 2)
    with pytest.raises(ValueError, match="not supported"):
        model.add_adapter("left", peft.LoraConfig(r=2, target_modules=["q_proj", "layernorm_before"]))
    with pytest.raises(ValueError, match="delete_adapter"):
        fastcss.one_pass(model)
    for module in model.modules():
        if "left" in getattr(module, "lora_A", ()):
            module.delete_adapter("left")
    assert_equal(fastcss.one_pass(model)(**given), loop(model, given))


@torch.no_grad()
def test_bad_routes():
    runner, given = fastcss.one_pass(build_adapted(vit)), inputs(vit, 2)
    for wrong in (3, -2):
        with pytest.raises(IndexError, match="route must hold places of 3 adapters"):
            runner(**given, route=torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="route has 3 entries"):
        runner(**given, route=torch.tensor([0, 1, 1]))
    for route in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), "task0"):
        with pytest.raises(TypeError, match="route must be a list of names, or an int32 or int64 tensor"):
            runner(**given, route=route)


def test_the_models_own_errors_come_through():
    runner = fastcss.one_pass(build_adapted(vit))
    for wrong in ({}, {"pixel_values": torch.randn(1, 3, 40, 40)}, {"pixel_values": torch.randn(1, 5, 32, 32)}):
        with pytest.raises(Exception) as own:  # noqa: PT011
            vit()(**wrong)
        with pytest.raises(type(own.value), match=re.escape(str(own.value)[:60])):
            runner(**wrong)
    assert runner.engine == "vmap"


def test_capture_wants_a_gpu():
    with pytest.raises(RuntimeError, match="on a CUDA device, got cpu"):
        fastcss.one_pass(build_adapted(vit)).capture(**inputs(vit))
