"""Tests folders that are no run of DecoupleCSS, or an incomplete one: the message must name what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from decouplecss_models import build
from safetensors.torch import load_file, save_file

from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss_folder import load, save_base, save_task
from fastcss.models.sam import SamSegmenter


def change(path: Path, value, *keys: str) -> None:
    """Change the value under these keys of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_no_run_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"is no run: .* no format"):
        load(saved / "base/detector")
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no config\.json"):
        save_task(build((1,)), 0, tmp_path)


def test_a_newer_version_is_named(run):
    change(run / "config.json", 2, "version")
    with pytest.raises(ValueError, match="is of version 2, this fastcss reads version 1"):
        load(run)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "fastcss DecoupleCSS", "version": 1}', "\xff"])
def test_a_broken_configuration_is_named(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load(run)


def test_a_missing_task_is_named(run):
    shutil.rmtree(run / "task_1")
    with pytest.raises(FileNotFoundError, match="task_1 is missing; there is task_2"):
        load(run)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "task.json", "task.safetensors"])
def test_a_missing_or_broken_file_is_named(run, name):
    path = run / "task_1" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"task_1/{name} is no"):
        load(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"task_1/{name} is missing"):
        load(run)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "task.pth"])
def test_a_pickle_is_refused(run, name):
    path = run / "task_0" / name
    path.with_suffix(".safetensors").rename(path)
    with pytest.raises(ValueError, match=f"{name} is a pickle, and loading it would run any code"):
        load(run)


def test_no_pickle_is_read_for_the_base(run):
    model = run / "base/segmenter/model.safetensors"
    torch.save(load_file(model), model.with_name("pytorch_model.bin"))
    model.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(run)


def test_another_detector_is_named(run):
    change(run / "config.json", 24, "detector", "config", "backbone_config", "embed_dim")
    message = r"base/detector is of another architecture: backbone\.\S+ is \[16, 3, 4, 4\], wanted \[24, 3, 4, 4\]; "
    with pytest.raises(ValueError, match=message + r".*; and \d+ more"):
        load(run)


@pytest.mark.parametrize(("depth", "message"), [(3, "is missing"), (2, None), (1, "is not wanted")])
def test_a_detector_of_another_depth_is_named(run, depth, message):
    change(run / "config.json", depth, "detector", "config", "encoder_layers")
    change(run / "config.json", 2, "detector", "config", "decoder_layers")  # of which nothing is read
    if message is None:
        assert len(load(run).tasks) == 3
    else:
        with pytest.raises(ValueError, match=rf"base/detector is of another .*: encoder\.layers\.[12]\.\S+ {message}"):
            load(run)


def test_another_sam_is_named(run):
    change(run / "config.json", 96, "segmenter", "config", "vision_config", "mlp_dim")
    with pytest.raises(ValueError, match=r"lin1\.weight is \[64, 32\], wanted \[96, 32\]"):
        load(run)


def test_a_base_that_has_moved_is_named(saved_model, saved, tmp_path):
    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    save_base(saved_model, tmp_path / "run", detector=base / "detector")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*/base/detector"):
        load(tmp_path / "run")


def test_an_adapter_of_another_rank_is_named(run):
    path = run / "task_1/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: x[:2] if "lora_A" in name else x[:, :2].clone() for name, x in tensors.items()}, path)
    message = r"task_1/adapter_model\.safetensors is of another .*lora_A\.weight is \[2, 16\], wanted \[4, 16\]"
    with pytest.raises(ValueError, match=message):
        load(run)


def test_an_adapter_of_another_scale_is_named(run):
    change(run / "task_1/adapter_config.json", 7, "lora_alpha")
    with pytest.raises(ValueError, match=r"task_1/adapter_config\.json: lora_alpha is 7, the run has 32"):
        load(run)


def test_generators_of_another_width_are_named(run):
    path = run / "task_2/task.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"generator.bias_1": tensors["generator.bias_1"][:, :60].clone()}, path)
    with pytest.raises(ValueError, match=r"task\.safetensors .* generator\.bias_1 is \[3, 60\], wanted \[3, 64\]"):
        load(run)


def test_a_task_goes_only_into_a_run_of_its_settings(run):
    with pytest.raises(ValueError, match=r"'sites': 'swin\+fusion'.* the model has .*'sites': 'fusion'"):
        save_task(build((1,), sites="fusion"), 0, run, overwrite=True)
    with pytest.raises(IndexError, match="no task 7, the model has 1"):
        save_task(build((1,)), 7, run)


@pytest.mark.parametrize(
    ("name", "value", "keys"),
    [
        ("config.json", 2.0, ("settings", "threshold")),
        ("config.json", {}, ("settings", "colour")),
        ("config.json", "a folder", ("detector",)),
        ("config.json", "wide", ("segmenter", "config", "vision_config", "hidden_size")),
        ("task_1/task.json", [[[101, 102], [101]]], ("input_ids",)),
        ("task_1/task.json", ["class 0.0"], ("classes",)),
        ("task_1/task.json", "task0", ("name",)),
    ],
)
def test_a_file_that_makes_no_sense_is_named(run, name, value, keys):
    change(run / name, value, *keys)
    with pytest.raises(ValueError, match=f"^DecoupleCSS: .*/{name}: "):
        load(run)


@pytest.mark.parametrize(("model", "part"), [(ClassDetector, "detector"), (SamSegmenter, "segmenter")])
def test_a_checkpoint_of_something_else_is_named(model, part, saved, run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        model.from_folder(str(tmp_path / "nowhere"))
    other = saved / "base" / ("segmenter" if part == "detector" else "detector")
    with pytest.raises(ValueError, match=rf"{other.name} holds a '\S+', wanted a '(sam|grounding-dino)'"):
        model.from_folder(str(other))
    path = run / "base" / part / "model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[:-1]), path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"base/{part} is of another architecture: \S+ is missing$"):
        model.from_folder(str(path.parent))
