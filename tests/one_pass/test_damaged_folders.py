"""Tests that folders which are damaged or cannot be right are refused by name, and the model is left alone."""

from __future__ import annotations

import pytest
import torch
from adapted_models import assert_untouched, edit_config, state_of
from safetensors.torch import load_file, save_file

import fastcss


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def to_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def to_convolution(folder, **options):
    """Put the adapter on the patch embedding instead, a convolution."""
    edit_config(folder, target_modules=["projection"], **options)
    key = "base_model.model.embeddings.patch_embeddings.projection"
    weights = {f"{key}.lora_A.weight": torch.ones(3, 3, 8, 8), f"{key}.lora_B.weight": torch.ones(32, 3, 1, 1)}
    edit_tensors(folder, lambda _: weights)


LAYER, NORM = "base_model.model.layers.0.attention.q_proj", "layernorm_before"
DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "safetensors is missing"),
    "pickle": (to_pickle, ValueError, "adapter_model.bin is a pickle"),
    "truncated": (truncate, ValueError, "no whole safetensors file"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "no PEFT configuration"),
    "other type": (lambda f: edit_config(f, peft_type="IA3"), TypeError, "task2 is a IA3 adapter, which PEFT"),
    "dora": (lambda f: edit_config(f, use_dora=True), ValueError, "no lora_magnitude_vector, but use_dora"),
    "no type": (lambda f: edit_config(f, peft_type=None), ValueError, "adapter_config.json.*no peft_type"),
    "velora": (
        lambda f: edit_config(f, velora_config={"num_groups": 2}), ValueError, "velora_embed' is not in the folder",
    ),
    "biases": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.base_layer.bias": torch.ones(32)}),
        TypeError,
        "q_proj.base_layer.bias' .* differs from the model's own",
    ),
    "pissa of random decompositions": (
        lambda f: edit_config(f, init_lora_weights="pissa_niter_4"),
        TypeError,
        "pissa_niter_4' draws .* at random.*convert",
    ),
    "corda": (lambda f: edit_config(f, init_lora_weights="corda"), TypeError, "corda' took out .*calibration data"),
    "lora-ga": (lambda f: edit_config(f, init_lora_weights="lora_ga"), TypeError, "lora_ga' took out .*gradients"),
    "loftq": (lambda f: edit_config(f, init_lora_weights="loftq"), TypeError, "loftq' was trained beside quantised"),
    "pissa on a convolution": (
        lambda f: to_convolution(f, init_lora_weights="pissa"), TypeError, "projection.* PEFT itself does not load",
    ),
    "other targets": (
        lambda f: edit_config(f, target_modules=["fc2"]), ValueError, "holds weights for 'layers.0.*wants none such",
    ),
    "other rank": (lambda f: edit_config(f, r=4), ValueError, "q_proj.* is of rank 3, its adapter_config.json"),
    "bias of B not in the config": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.lora_B.bias": torch.ones(32)}),
        ValueError,
        "holds a bias of B, but lora_bias is False",
    ),
    "bias of B missing": (lambda f: edit_config(f, lora_bias=True), ValueError, "no bias of B, but lora_bias is True"),
    "bias of A": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.lora_A.bias": torch.ones(3)}), ValueError, "A.bias' has no",
    ),
    "the same twice": (
        lambda f: edit_tensors(f, lambda t: t | {k.removeprefix("base_model.model."): v.clone() for k, v in t.items()}),
        ValueError,
        "a second time",
    ),
    "two adapters": (
        lambda f: edit_tensors(f, lambda t: {k.replace("B.", "B.a.").replace("A.", "A.b."): v for k, v in t.items()}),
        ValueError,
        r"several adapters, \['a', 'b'\]",
    ),
    "kohya": (
        lambda f: edit_tensors(f, lambda t: {k.replace("lora_A", "lora_down"): v for k, v in t.items()}),
        TypeError,
        "lora_down.* of kohya's scripts.*convert",
    ),
    "compiled": (
        lambda f: edit_tensors(f, lambda t: {k.replace("layers.0", "_orig_mod.layers.0"): v for k, v in t.items()}),
        ValueError,
        "'_orig_mod.' of torch.compile",
    ),
    "sharded": (
        lambda f: edit_tensors(f, lambda t: {k: torch.ones(0) if "0.att" in k else v for k, v in t.items()}),
        ValueError,
        r"q_proj.* is empty, \[0\] and \[0\].*ZeRO-3",
    ),
    "magnitudes": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.lora_magnitude_vector": torch.ones(3)}),
        ValueError,
        "a lora_magnitude_vector, but use_dora is False",
    ),
    "other weights": (
        lambda f: edit_tensors(f, lambda t: t | {"base_model.model.pooler": torch.ones(3)}), TypeError, "pooler",
    ),
    "half": (
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if "lora_B" not in k}), ValueError, "one half",
    ),
    "nothing": (lambda f: edit_tensors(f, lambda t: {}), ValueError, "no adapter weights"),
    "missing layer": (
        lambda f: edit_tensors(f, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
        ValueError,
        "no layer 'layers.7.*another base model",
    ),
    "other width": (
        lambda f: edit_tensors(f, lambda t: {k: torch.ones(4, 48) if "lora_A" in k else v for k, v in t.items()}),
        ValueError,
        "layer 'layers.*holds.*48.*another base model",
    ),
    "other kind": (
        lambda f: (
            edit_config(f, target_modules=[NORM, "fc2"]),
            edit_tensors(f, lambda t: {k.replace("attention.q_proj", NORM): v for k, v in t.items()}),
        ),
        TypeError,
        "which PEFT does not load here: Target module LayerNorm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(saved, damage):
    bare, _, folders = saved
    harm, error, message = DAMAGES[damage]
    harm(folders[2])
    before = state_of(bare)
    with pytest.raises(error, match=message):
        fastcss.one_pass.from_directories(bare, folders)
    assert_untouched(bare, before)


def test_wrong_names_and_models(saved):
    bare, model, folders = saved
    with pytest.raises(ValueError, match="different adapter names"):
        fastcss.one_pass.from_directories(bare, [folders[0], folders[0]])
    with pytest.raises(ValueError, match="different adapter names"):
        fastcss.one_pass.from_directories(bare, folders, names=["a", "b"])
    with pytest.raises(ValueError, match="at least one folder"):
        fastcss.one_pass.from_directories(bare, [])
    with pytest.raises(ValueError, match="has adapters already"):
        fastcss.one_pass.from_directories(model.get_base_model(), folders)


def test_options_of_a_later_peft_are_named(saved):
    bare, _, folders = saved
    edit_config(folders[2], use_quux=True, quux_config=None)
    with pytest.warns(UserWarning, match=r"task2: adapter_config.json has options .*\{'use_quux': True\}"):
        fastcss.one_pass.from_directories(bare, folders)
