"""Tests folders of frozen models that others made: by transformers 4, in half precision, with pickles, incomplete."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from continual_runs import SETTINGS, plan_of
from safetensors.torch import load_file, save_file
from transformers import GroundingDinoForObjectDetection, GroundingDinoModel

from fastcss.models import grounding_dino
from fastcss.models.continual import begin, load_run
from fastcss.models.decouplecss_folder import checkpoint_folders
from fastcss.models.grounding_dino import GroundingDinoEncoder
from fastcss.models.phrases import load_tokenizer
from fastcss.models.sam import SamSegmenter

UNUSED = "backbone.conv_encoder.model.swin.layernorm."


@pytest.fixture(scope="module")
def inputs():
    ids = grounding_dino.phrases_to_ids([(5, 6), (7,)])[0]
    return {"pixel_values": torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(1)), "input_ids": ids}


@pytest.fixture(params=[GroundingDinoModel, GroundingDinoForObjectDetection])
def of_transformers_4(request, tmp_path) -> tuple[Path, GroundingDinoModel]:
    """Writes a folder as transformers 4.46 does, and returns the model, too: its Swin is no module within the backbone,
    and has no norm of its own."""
    torch.manual_seed(0)
    config = grounding_dino._config("tiny")
    config.decoder_layers = 2  # the heads of one layer could not be tied to another's
    model = request.param(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.replace("model.swin.", "model."): tensor for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in tensors.items() if "backbone.conv_encoder.model.layernorm." not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, path, {"format": "pt"})
    return tmp_path, getattr(model, "model", model)


@torch.no_grad()
def test_a_folder_of_transformers_4(of_transformers_4, inputs):
    folder, model = of_transformers_4
    encoder, expected = GroundingDinoEncoder.from_folder(folder), model(**inputs)
    for _ in range(2):
        got = encoder(**inputs)
        assert torch.equal(got.last_hidden_state_vision, expected.encoder_last_hidden_state_vision)
        assert torch.equal(got.last_hidden_state_text, expected.encoder_last_hidden_state_text)
        for name, parameter in encoder.named_parameters():  # what is not there is never read
            if name.startswith(UNUSED):
                parameter.fill_(torch.nan)


def test_any_other_tensor_must_be_there(of_transformers_4):
    folder, _ = of_transformers_4
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.0.blocks.0.layernorm_after.weight"))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"architecture: \S+swin\.encoder\.layers\.0\.blocks\.0\.layernorm_after\.weight is missing$"
    ):
        GroundingDinoEncoder.from_folder(folder)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "bfloat16")])
def test_a_run_from_folders_in_half_precision(digit_models, tmp_path, dtypes):
    """Models in half precision must be read in float32: adapters and generators of another dtype could not multiply."""
    places = checkpoint_folders(digit_models)
    folders = {part: tmp_path / part for part in places}
    tokenizer = load_tokenizer(places["detector"])
    for (part, place), dtype in zip(places.items(), dtypes, strict=True):
        folders[part].mkdir()
        tensors = load_file(place / "model.safetensors")
        cast = {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}
        save_file(cast, folders[part] / "model.safetensors", {"format": "pt"})
        config = json.loads((place / "config.json").read_text())
        (folders[part] / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    tokenizer.save_pretrained(folders["detector"])
    begin(tmp_path / "run", plan_of(), tuple(folders.values()), settings=SETTINGS)
    model, _ = load_run(tmp_path / "run")
    for part, kept in (("detector", model.detector), ("segmenter", model.segmenter.model)):
        assert {parameter.dtype for parameter in kept.parameters()} == {torch.float32}
        tensors, state = load_file(folders[part] / "model.safetensors"), kept.state_dict()
        assert all(torch.equal(state[name], tensors[name].float()) for name in state.keys() & tensors.keys())


def spoil(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "half a config":
        config.write_bytes(config.read_bytes()[:100])
    elif kind == "a list":
        config.write_text("[1]")
    elif kind == "a width of letters":
        content = json.loads(config.read_text())
        content["vision_config"]["hidden_size"] = "wide"
        config.write_text(json.dumps(content))
    elif kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "a pointer":  # of git-lfs, whose file was not fetched
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    else:
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
        if kind == "nothing":
            (folder / "pytorch_model.bin").unlink()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("no config", FileNotFoundError, "has no config.json"),
        ("half a config", ValueError, "config.json is no JSON: "),
        ("a list", ValueError, "holds a [1], wanted a 'sam'"),
        ("a width of letters", ValueError, "config.json: Validation error for field 'hidden_size'"),
        ("half the weights", ValueError, "holds no whole safetensors file: "),
        ("a pointer", ValueError, "holds no whole safetensors file: "),
        ("a pickle", FileNotFoundError, "has no model.safetensors but pytorch_model.bin, a pickle"),
        ("nothing", FileNotFoundError, "has no model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(digit_models, tmp_path, kind, error, message):
    places = checkpoint_folders(digit_models)
    folder = Path(shutil.copytree(places["segmenter"], tmp_path / "sam"))
    spoil(folder, kind)
    with pytest.raises(error, match=rf"{re.escape(str(folder))}.*{re.escape(message)}"):
        SamSegmenter.from_folder(str(folder))
    if kind == "a pickle":
        with pytest.raises(error, match=re.escape(message)):
            begin(tmp_path / "run", plan_of(), (places["detector"], folder), settings=SETTINGS)
        assert not (tmp_path / "run").exists()
