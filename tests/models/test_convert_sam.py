"""Tests segment-anything's checkpoints as transformers' folders: each tensor in its place, the same architecture."""

from __future__ import annotations

import argparse
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from fastcss.__main__ import main
from fastcss.models import convert_sam as module
from fastcss.models.checkpoint import empty
from fastcss.models.convert_sam import convert_sam
from fastcss.models.sam import SamSegmenter

EPS = 1e-5  # of the norms in segment-anything's two-way transformer

# Maps a module of transformers to its name in segment-anything, also where that has bare parameters instead.
MODULES = {
    "vision_encoder.patch_embed.projection": "image_encoder.patch_embed.proj",
    "vision_encoder.neck.conv1": "image_encoder.neck.0",
    "vision_encoder.neck.layer_norm1": "image_encoder.neck.1",
    "vision_encoder.neck.conv2": "image_encoder.neck.2",
    "vision_encoder.neck.layer_norm2": "image_encoder.neck.3",
    "prompt_encoder.mask_embed.conv1": "prompt_encoder.mask_downscaling.0",
    "prompt_encoder.mask_embed.layer_norm1": "prompt_encoder.mask_downscaling.1",
    "prompt_encoder.mask_embed.conv2": "prompt_encoder.mask_downscaling.3",
    "prompt_encoder.mask_embed.layer_norm2": "prompt_encoder.mask_downscaling.4",
    "prompt_encoder.mask_embed.conv3": "prompt_encoder.mask_downscaling.6",
    "mask_decoder.transformer.layer_norm_final_attn": "mask_decoder.transformer.norm_final_attn",
    "mask_decoder.upscale_conv1": "mask_decoder.output_upscaling.0",
    "mask_decoder.upscale_layer_norm": "mask_decoder.output_upscaling.1",
    "mask_decoder.upscale_conv2": "mask_decoder.output_upscaling.3",
    "mask_decoder.iou_prediction_head.proj_in": "mask_decoder.iou_prediction_head.layers.0",
    "mask_decoder.iou_prediction_head.layers.0": "mask_decoder.iou_prediction_head.layers.1",
    "mask_decoder.iou_prediction_head.proj_out": "mask_decoder.iou_prediction_head.layers.2",
    **{f"prompt_encoder.point_embed.{i}": f"prompt_encoder.point_embeddings.{i}" for i in range(4)},
    **{
        f"mask_decoder.output_hypernetworks_mlps.{i}.{ours}": f"mask_decoder.output_hypernetworks_mlps.{i}.layers.{n}"
        for i in range(4)
        for n, ours in enumerate(("proj_in", "layers.0", "proj_out"))
    },
    **{
        f"mask_decoder.transformer.layers.{i}.layer_norm{n}": f"mask_decoder.transformer.layers.{i}.norm{n}"
        for i in range(2)
        for n in range(1, 5)
    },
}


def segment_anything_name(name: str) -> str:
    """Return segment-anything's name of a tensor that transformers calls ``name``."""
    if name == "shared_image_embedding.positional_embedding":
        return "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    owner, leaf = name.rsplit(".", 1)
    if match := re.fullmatch(r"vision_encoder\.layers\.(\d+)\.(.+)", owner):
        return f"image_encoder.blocks.{match[1]}.{match[2].replace('layer_norm', 'norm')}.{leaf}"
    return f"{MODULES.get(owner, owner.replace('vision_encoder', 'image_encoder'))}.{leaf}"


def state_of(model: SamModel) -> dict[str, Tensor]:
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    return {segment_anything_name(name): tensor for name, tensor in model.state_dict().items() if name != tied}


@pytest.fixture(scope="module")
def model() -> SamModel:
    vision = SamVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=64, patch_size=8, mlp_dim=80,
        output_channels=32, num_pos_feats=16, window_size=3, global_attn_indexes=[1],
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=32, image_size=64, patch_size=8, mask_input_channels=8)
    decoder = SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, iou_head_hidden_dim=24, layer_norm_eps=EPS)
    torch.manual_seed(0)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for parameter in model.parameters():  # none is all zeros or ones, as they come
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(state_of(model), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


def test_every_tensor_finds_its_place(model, checkpoint, tmp_path):
    convert_sam(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    converted = SamSegmenter.from_folder(str(tmp_path / "out"))
    got, expected = converted.model.state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    pixels, prompts = torch.randn(1, 3, 64, 64), torch.randn(2, 6, 32)
    segmenter = SamSegmenter(model)
    with torch.no_grad():
        assert torch.equal(converted.embed(pixels), segmenter.embed(pixels))
        embedding = segmenter.embed(pixels)
        for first, second in zip(
            converted.decode(embedding, prompts), segmenter.decode(embedding, prompts), strict=True
        ):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "wide"),
    [
        ("vit_b", 768, 12, 12, [2, 5, 8, 11]),
        ("vit_l", 1024, 24, 16, [5, 11, 17, 23]),
        ("vit_h", 1280, 32, 16, [7, 15, 23, 31]),
    ],
)
def test_the_published_sizes_are_recognised(name, width, depth, heads, wide):
    """The sizes must be recognised by the tensors' shapes: no tensor has memory here."""
    vision = SamVisionConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, global_attn_indexes=wide
    )
    published = SamConfig(vision_config=vision, mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=EPS))
    config = module._config(state_of(empty(SamModel, published)), name)
    assert module.SIZES[width] == name
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        assert getattr(config, part).to_dict() == getattr(published, part).to_dict()


NORM = "image_encoder.blocks.1.norm1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, r"vision_encoder\.layers\.1\.layer_norm1\.weight is missing"),
        ({NORM: torch.zeros(40)}, r"vision_encoder\.layers\.1\.layer_norm1\.weight is \[40\], wanted \[48\]"),
        ({"mask_decoder.hf_token.weight": torch.zeros(1, 32)}, r"mask_decoder\.hf_token\.weight is not wanted"),
        ({"image_encoder.pos_embed": None}, r"no checkpoint of SAM: image_encoder\.pos_embed is missing"),
        (
            {"image_encoder.patch_embed.proj.weight": None},
            r"no image_encoder\.patch_embed\.proj\.weight in it; it holds 'p",
        ),
    ],
)
def test_what_is_no_sam_is_named(model, tmp_path, change, message):
    state = {name: value for name, value in (state_of(model) | change).items() if value is not None}
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"sam\.pth .*" + message):
        convert_sam(tmp_path / "sam.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def optimizer_of(state: dict[str, Tensor]) -> dict:
    """Make an optimizer's state that has moments, after a step."""
    parameter = torch.nn.Parameter(state[NORM].clone())
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "entry": lambda state: {"model": state, "optimizer": optimizer_of(state), "epoch": 3},
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.5.0", "epoch": 3, "optimizer_states": [optimizer_of(state)],
        "state_dict": prefixed(state, "model.sam.") | {"loss.weight": torch.ones(3)},
    },
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: {"net": {"ema": prefixed(state, "_orig_mod.") | {"n_averaged": torch.tensor(5)}}},
    "with numbers": lambda state: state | {"epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_trainers_lay_around_a_checkpoint_is_taken_off(model, tmp_path, wrapper):
    torch.save(WRAPPED[wrapper](state_of(model)), tmp_path / "sam.pth")
    convert_sam(tmp_path / "sam.pth", tmp_path / "out")
    got = SamSegmenter.from_folder(str(tmp_path / "out")).model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_in_safetensors(model, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in state_of(model).items()}, tmp_path / "sam.safetensors")
    convert_sam(tmp_path / "sam.safetensors", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {"model": state, "ema": state}, "more than one SAM, 'model' → '' and 'ema' → ''"),
        (lambda state: prefixed(state, "student.") | prefixed(state, "teacher."), "'student.' and 'teacher.'"),
        (lambda state: {"model": [1, 2], "epoch": 3}, "it holds 'model', 'epoch'"),
        (lambda state: {}, "it holds nothing"),
        (lambda state: [state], "it holds a list"),
        (lambda state: {"state_dict": state, "hyper_parameters": argparse.Namespace(rate=1)}, "argparse.Namespace"),
    ],
)
def test_what_holds_no_sam_or_several_says_what_it_holds(model, tmp_path, content, message):
    torch.save(content(state_of(model)), tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_sam(tmp_path / "sam.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is a folder"):
        convert_sam(tmp_path, tmp_path / "out")


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"weight": Harmful()}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_sam(tmp_path / "sam.pth", tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_half_a_checkpoint_is_named(checkpoint, tmp_path):
    for text in (checkpoint.read_bytes()[:-1000], b"", b"no checkpoint"):
        checkpoint.write_bytes(text)
        with pytest.raises(ValueError, match=r"sam\.pth is not whole"):
            convert_sam(checkpoint, tmp_path / "out")


def test_a_folder_that_is_there_stays_as_it_is(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="out is there already"):
        convert_sam(checkpoint, tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastcss", "convert-sam", str(checkpoint), str(tmp_path / "out")])
    main()
    assert capsys.readouterr() == (f"{tmp_path / 'out'}: SAM, 3 layers of width 48, 64 pixels\n", "")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "convert-sam: " in (message := capsys.readouterr().err)
    assert "out is there already" in message
