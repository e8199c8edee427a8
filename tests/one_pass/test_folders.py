"""Adapters read from the folders that PEFT saves: equal to PEFT's, and damaged ones refused by name."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from adapted_models import (
    RANKS,
    SITES,
    adapt,
    assert_equal,
    assert_untouched,
    clip_text,
    gpt2,
    inputs,
    loop,
    regnet,
    state_of,
    vit,
)

import fastcss


@pytest.fixture
def saved(tmp_path):
    """(bare model, PEFT model, folders) of one small ViT whose adapters differ in everything."""
    torch.manual_seed(0)
    bare = vit()
    model = adapt(
        copy.deepcopy(bare),
        {"r": 2, "target_modules": ["q_proj", "projection"]},
        {"r": 5, "target_modules": ["fc1"], "use_rslora": True, "lora_bias": True},
        {"r": 3, "target_modules": ["q_proj", "fc2"], "alpha_pattern": {"layers.1.attention.q_proj": 9}},
    )
    model.save_pretrained(tmp_path)
    return bare.eval(), model, [tmp_path / f"task{t}" for t in range(3)]


@torch.no_grad()
def test_folders_equal_peft(saved):
    bare, model, folders = saved
    before = state_of(bare)
    runner = fastcss.one_pass.from_directories(bare, folders)
    assert runner.adapters == ("task0", "task1", "task2")
    assert_equal(runner(**inputs(vit, 2)), loop(model, inputs(vit, 2)))
    assert_untouched(bare, before)
    named = fastcss.one_pass.from_directories(bare, [str(folders[1]), folders[0]], ["b", "a"])
    assert_equal(named(**inputs(vit)), loop(model, inputs(vit), ["task1", "task0"]))


@pytest.mark.parametrize("build", [clip_text, regnet, gpt2])
@torch.no_grad()
def test_folders_of_embeddings_and_convolutions(build, tmp_path):
    torch.manual_seed(0)
    bare = build()
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": SITES[build]} for r in RANKS.get(build, (4, 8))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: it saves the embedding too
        model.save_pretrained(tmp_path)
    runner = fastcss.one_pass.from_directories(bare.eval(), [tmp_path / name for name in model.peft_config])
    assert_equal(runner(**inputs(build, 2)), loop(model, inputs(build, 2)))


# --- damaged ----------------------------------------------------------------------------------------------------------


def edit_config(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def to_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


LAYER, NORM = "base_model.model.layers.0.attention.q_proj", "layernorm_before"
DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "safetensors is missing"),
    "pickle": (to_pickle, ValueError, "adapter_model.bin is a pickle"),
    "truncated": (truncate, ValueError, "no whole safetensors file"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "no PEFT configuration"),
    "other type": (lambda f: edit_config(f, peft_type="IA3"), TypeError, "IA3 adapter"),
    "dora": (lambda f: edit_config(f, use_dora=True), TypeError, "uses use_dora"),
    "biases": (lambda f: edit_config(f, bias="all"), TypeError, "own biases"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), TypeError, "changes the base weights"),
    "magnitudes": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.lora_magnitude_vector": torch.ones(3)}),
        TypeError,
        "lora_magnitude_vector",
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
        lambda f: edit_tensors(f, lambda t: {k.replace("attention.q_proj", NORM): v for k, v in t.items()}),
        TypeError,
        "layernorm_before' is LayerNorm",
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
        fastcss.one_pass.from_directories(bare, folders, ["a", "b"])
    with pytest.raises(ValueError, match="at least one folder"):
        fastcss.one_pass.from_directories(bare, [])
    with pytest.raises(ValueError, match="has adapters already"):
        fastcss.one_pass.from_directories(model.get_base_model(), folders)
