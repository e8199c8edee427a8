"""Tests adapters that were trained with biases of the base model, which PEFT lets one adapter of a model have."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from adapted_models import adapt, assert_equal, assert_untouched, inputs, loop, reloaded, save, state_of, vit
from safetensors.torch import load_file, save_file
from torch import nn

import fastcss


class Net(nn.Module):
    """Has a bias on each kind of layer, one of which has a layer in it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 6)

    def forward(self, pixel_values):
        return (self.last(self.second(self.norm(self.first(pixel_values))).mean((2, 3))),)


CONFIGS = {
    vit: [
        {"target_modules": ["q_proj", "fc1"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True},
        {"target_modules": ["fc1", "v_proj"]},
        {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    ],
    Net: [
        {"target_modules": ["second", "last"], "bias": "all", "r": 4},
        {"target_modules": ["first"], "bias": "lora_only", "use_dora": True},
        {"target_modules": ["second"], "r": 4},
    ],
}


def make(build, folder):
    """Return the bare model and a folder for each configuration, saved from a model of its own."""
    torch.manual_seed(0)
    bare, folders = build().eval(), []
    for t, config in enumerate(CONFIGS[build]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about merging grouped convolutions
            model = adapt(copy.deepcopy(bare), {"r": 3, **config})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias") and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        folders += [path / "task0" for path in [folder / str(t)] if save(model, path)]
    return bare, folders, inputs(vit, 2)


def of_adapter(bare, folder, given):
    return peft.PeftModel.from_pretrained(copy.deepcopy(bare), folder)(**given)


@pytest.mark.parametrize("build", CONFIGS)
@torch.no_grad()
def test_folders_with_biases_run_as_peft_runs_them(build, tmp_path):
    bare, folders, given = make(build, tmp_path)
    before, names = state_of(bare), [f"t{i}" for i in range(len(folders))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = fastcss.one_pass.from_directories(bare, folders, names=names)
        got = runner(**given)
        in_turn = fastcss.one_pass.from_directories(bare, folders, names=names, engine="replay")
        assert runner.engine == "vmap"
    assert_untouched(bare, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reloaded(bare, folders, given)
        assert_equal(got, expected)
        assert_equal(in_turn(**given), expected)
        assert_equal(runner(**given, adapters=["t2", "t1"]), [expected[2], expected[1]])
        route = torch.tensor([1, -1])
        one = {"pixel_values": given["pixel_values"][:1]}
        plain = bare(given["pixel_values"][1:])[0]
        routed = torch.cat([of_adapter(bare, folders[1], one)[0], plain])
        torch.testing.assert_close(runner(**given, route=route)[0], routed, atol=1e-5, rtol=0)
        for parameter in bare.parameters():
            parameter.data.mul_(1.1)
        assert_equal(runner(**given), reloaded(bare, folders, given))
        bare.double()
        given = {name: t.double() for name, t in given.items()}
        assert_equal(runner(**given), reloaded(bare, folders, given), 1e-12)


@torch.no_grad()
def test_a_live_model_with_biases():
    """PEFT trains the base model's own biases there, which so belong to every adapter."""
    torch.manual_seed(0)
    model = adapt(vit(), {"r": 2, "target_modules": ["q_proj"], "bias": "all"}, {"r": 3, "target_modules": ["q_proj"]})
    runner, given = fastcss.one_pass(model), inputs(vit, 2)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.add_(torch.randn_like(parameter))
    assert_equal(runner(**given), loop(model, given))


def test_biases_that_do_not_fit(tmp_path):
    bare, folders, _ = make(vit, tmp_path)
    path = folders[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.layernorm.bias": torch.ones(9)}, path)
    with pytest.raises(ValueError, match=r"'base_model.model.layernorm.bias' is \[9\], and the model's \[32\]"):
        fastcss.one_pass.from_directories(bare, folders[:1])
    save_file(tensors | {"base_model.model.nowhere.bias": torch.ones(9)}, path)
    with pytest.raises(TypeError, match=r"'base_model.model.nowhere.bias' is no LoRA weight"):
        fastcss.one_pass.from_directories(bare, folders[:1])


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.layer(x) + self.bias


def test_a_bias_beside_an_adapted_layer_is_refused(tmp_path):
    bare = nn.Sequential(Inner())
    model = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": ["layer"], "bias": "all"})
    folders = save(model, tmp_path)
    with pytest.raises(TypeError, match=r"have '0' for themselves .* and '0.layer', which lies in it"):
        fastcss.one_pass.from_directories(bare, folders)
