"""Tests DoRA beside LoRA, on every kind of layer that has a form here, against PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapt, assert_equal, assert_untouched, gpt2, inputs, loop, reloaded, save, state_of, vit
from safetensors.torch import load_file, save_file
from torch import nn

import fastcss


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, 2, groups=2, bias=False)

    def forward(self, pixel_values):
        return (self.second(self.first(pixel_values).relu()),)


SITES = {vit: ["q_proj", "fc1"], gpt2: ["c_attn", "wte"], Convolutions: ["first", "second"]}
MODELS = list(SITES)


def make(build, **options):
    """Return the bare model, one with DoRA, LoRA, and DoRA on a part of the layers, and inputs."""
    torch.manual_seed(0)
    bare, sites = build().eval(), SITES[build]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about merging grouped convolutions, and fan_in_fan_out
        model = adapt(
            copy.deepcopy(bare),
            {"r": 4, "target_modules": sites, "use_dora": True, **options},
            {"r": 2, "target_modules": sites},
            {"r": 2, "target_modules": sites[1:], "use_dora": True, "use_rslora": True},
        )
    return bare, model, inputs(build, 2)


@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_dora_runs_as_peft_runs_it(build, tmp_path):
    bare, model, given = make(build)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner, in_turn = fastcss.one_pass(model), fastcss.one_pass(model, engine="replay")
        got = runner(**given)
        assert not runner._model_copy.runs_pefts_layers
    assert_untouched(model, before)
    assert_equal(got, loop(model, given))
    held = runner._model_copy
    for part in ("lora_A", "lora_magnitude_vector", "base_layer.weight"):  # the norm is of the base layer's weight too
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data.mul_(1.5)
        assert_equal(runner(**given), loop(model, given))
        assert_equal(in_turn(**given), loop(model, given))
        assert_equal(runner(**given, adapters=["task2", "task0"]), loop(model, given, ["task2", "task0"]))
    assert runner._model_copy is held
    route = torch.tensor([2, -1])
    (chosen,) = loop(model, {name: value[:1] for name, value in given.items()}, ["task2"])
    with model.disable_adapter():
        plain = model(**{name: value[1:] for name, value in given.items()})
    torch.testing.assert_close(runner(**given, route=route)[0], torch.cat([chosen[0], plain[0]]), atol=1e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = save(model, tmp_path)
        of_folders = fastcss.one_pass.from_directories(bare, folders)
        assert_equal(of_folders(**given), reloaded(bare, folders, given))
        assert not of_folders._model_copy.runs_pefts_layers
        next(p for name, p in bare.named_parameters() if name.endswith(f"{SITES[build][1]}.weight")).data.mul_(1.5)
        assert_equal(of_folders(**given), reloaded(bare, folders, given))
        bare.double()
        given = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        assert_equal(of_folders(**given), reloaded(bare, folders, given), 1e-12)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_dora_trains_as_in_peft(build, dropout, monkeypatch):
    """A dropout that scales but drops nothing, or drops all: the same in both."""
    _, model, given = make(build, lora_dropout=dropout)
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x / (1 - p) if p < 1 else x * 0)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape) * 0.99)
    names = list(model.peft_config)
    for module in model.modules():  # the model's own dropout stays off
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.train()
    model.set_requires_grad(names)
    outputs = []
    for adapter in names:
        model.set_adapter(adapter)
        model.set_requires_grad(names)
        outputs.append(model(**given)[0])
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(5))
    sum((output * weights).sum() for output in outputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = fastcss.one_pass(model, engine="vmap")(**given)[0]
    torch.testing.assert_close(got, torch.stack(outputs), atol=1e-5, rtol=0)
    (got * weights).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert sum("magnitude" in name for name in got) > 2
    for name, gradient in expected.items():
        atol = 1e-6 + 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, atol=atol, rtol=0, msg=name)


@torch.no_grad()
def test_the_scales_are_not_taken_in_autocasts_dtype():
    _, model, given = make(vit)
    runner = fastcss.one_pass(model)
    with torch.autocast("cpu", torch.bfloat16):
        runner(**given)
    assert_equal(runner(**given), loop(model, given))


def test_a_folder_whose_magnitudes_do_not_fit(tmp_path):
    bare, model, _ = make(vit)
    path = save(model, tmp_path)[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if "magnitude" in key)] = torch.ones(5)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"its lora_magnitude_vector .* is \[5\]"):
        fastcss.one_pass.from_directories(bare, [path.parent])
