"""Tests every option of a LoraConfig that leaves plain LoRA, live and from PEFT's folders, against PEFT itself."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import adapt, assert_equal, gpt2, inputs, loop, regnet, reloaded, save, vit

import fastcss

QKV = ["q_proj", "v_proj"]
CONFIGS = {
    "rank and alpha patterns": {
        "target_modules": QKV,
        "rank_pattern": {r"layers\.1\..*q_proj": 7, "v_proj": 1},
        "alpha_pattern": {"layers.0.attention.v_proj": 30},
    },
    "rslora with patterns": {"target_modules": QKV, "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "biases of B": {"target_modules": ["fc1"], "lora_bias": True},
    "all of the model's biases": {"target_modules": QKV, "bias": "all"},
    "biases of adapted layers": {"target_modules": QKV, "bias": "lora_only"},
    "layers of a pattern": {"target_modules": QKV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"target_modules": QKV, "layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    "names excluded": {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["layers.0.mlp.fc1"]},
    "pattern excluded": {"target_modules": ["q_proj", "fc1"], "exclude_modules": r".*\.0\..*_proj"},
    "pattern": {"target_modules": r"layers\.\d\.mlp\.(fc1|fc2)"},
    "full names": {"target_modules": ["layers.1.mlp.fc2", "layers.0.attention.q_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "dropout": {"target_modules": QKV, "lora_dropout": 0.5},
    "gaussian": {"target_modules": QKV, "init_lora_weights": "gaussian"},
    "random": {"target_modules": QKV, "init_lora_weights": False},
    "orthogonal": {"target_modules": QKV, "init_lora_weights": "orthogonal", "r": 4},
    "mica": {"target_modules": QKV, "init_lora_weights": "mica"},
    "pissa": {"target_modules": QKV, "init_lora_weights": "pissa"},
    "pissa, rslora": {"target_modules": ["fc1"], "init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"target_modules": QKV, "init_lora_weights": "olora", "rank_pattern": {"v_proj": 5}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_config_runs_as_peft_runs_it(name, tmp_path):
    torch.manual_seed(0)
    bare, given = vit().eval(), inputs(vit, 2)
    model = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": ["q_proj"]}, {"r": 3, **CONFIGS[name]})
    assert_equal(fastcss.one_pass(model)(**given), loop(model, given))
    folders = save(model, tmp_path)
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given))


def test_pissa_on_conv1d_in_training_drops_nothing_of_the_base_layer(tmp_path):
    torch.manual_seed(0)
    bare, given = gpt2().eval(), inputs(gpt2, 2)
    for module in bare.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the model's own
    dropped = {"init_lora_weights": "pissa", "lora_dropout": 1.0}  # every input is dropped, so nothing is random
    plain = {"r": 2, "target_modules": ["c_fc"]}
    model = adapt(copy.deepcopy(bare), {"r": 3, "target_modules": ["c_attn"], **dropped}, plain)
    folders = save(model, tmp_path)
    runner = fastcss.one_pass.from_directories(bare, folders)
    bare.train()
    assert_equal(runner(**given), reloaded(bare, folders, given, train=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("build", [vit, regnet, gpt2])
@torch.no_grad()
def test_adapters_in_another_dtype_than_the_model(build, dtype, tmp_path):
    torch.manual_seed(0)
    bare, given = build().eval(), inputs(build, 2)
    sites = ["convolution"] if build is regnet else ["q_proj", "fc1", "c_attn", "wte"]
    options = {"target_modules": sites, "lora_bias": build is not gpt2}  # PEFT has no biases beside embeddings
    model = adapt(copy.deepcopy(bare), *({"r": r, **options} for r in (4, 8)))
    of_task1 = [p for name, p in model.named_parameters() if "lora_" in name and "task1" in name]
    for parameter in of_task1:
        parameter.data = parameter.data.to(dtype)
    got = fastcss.one_pass(model)(**given)
    folders = save(model, tmp_path)
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given))
    for parameter in of_task1:  # the same values in float32: what PEFT rounds on its way is no part of the adapter
        parameter.data = parameter.data.float()
    assert_equal(got, loop(model, given))


@torch.no_grad()
def test_a_float64_model_keeps_its_precision(tmp_path):
    torch.manual_seed(0)
    bare = vit().double().eval()
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": ["q_proj", "fc1"]} for r in (3, 7)))
    given = {name: tensor.double() for name, tensor in inputs(vit, 2).items()}
    folders = save(model, tmp_path)
    assert_equal(fastcss.one_pass(model)(**given), loop(model, given), 1e-12)
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given), 1e-12)
