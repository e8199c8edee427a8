"""Converts segment-anything's checkpoints of SAM into folders that transformers reads."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from .._files import read_tensors, whole_folder
from .checkpoint import check_tensors, empty, save_pretrained

#: The published models have these names, by the width of their image encoder.
SIZES = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}

# Each pair is a part of a name in segment-anything, and what transformers calls it; they are applied in this order.
_NAMES = (
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^(vision_encoder\.patch_embed)\.proj\.", r"\1.projection."),
    (r"^(vision_encoder)\.blocks\.(\d+)\.norm([12])\.", r"\1.layers.\2.layer_norm\3."),
    (r"^(vision_encoder)\.blocks\.", r"\1.layers."),
    (r"^(vision_encoder\.neck)\.0\.", r"\1.conv1."),
    (r"^(vision_encoder\.neck)\.1\.", r"\1.layer_norm1."),
    (r"^(vision_encoder\.neck)\.2\.", r"\1.conv2."),
    (r"^(vision_encoder\.neck)\.3\.", r"\1.layer_norm2."),
    (r"^(prompt_encoder)\.point_embeddings\.", r"\1.point_embed."),
    (r"^(prompt_encoder)\.mask_downscaling\.0\.", r"\1.mask_embed.conv1."),
    (r"^(prompt_encoder)\.mask_downscaling\.1\.", r"\1.mask_embed.layer_norm1."),
    (r"^(prompt_encoder)\.mask_downscaling\.3\.", r"\1.mask_embed.conv2."),
    (r"^(prompt_encoder)\.mask_downscaling\.4\.", r"\1.mask_embed.layer_norm2."),
    (r"^(prompt_encoder)\.mask_downscaling\.6\.", r"\1.mask_embed.conv3."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm([1234])\.", r"\1.layer_norm\2."),
    (r"^(mask_decoder\.transformer)\.norm_final_attn\.", r"\1.layer_norm_final_attn."),
    (r"^(mask_decoder)\.output_upscaling\.0\.", r"\1.upscale_conv1."),
    (r"^(mask_decoder)\.output_upscaling\.1\.", r"\1.upscale_layer_norm."),
    (r"^(mask_decoder)\.output_upscaling\.3\.", r"\1.upscale_conv2."),
)
_HEADS = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\."
_TIED = "prompt_encoder.shared_embedding.positional_embedding"
_FIRST = "image_encoder.patch_embed.proj.weight"  # every SAM has it; a prefix before it belongs to a wrapper
_DEEP = 3  # so many wrappers within wrappers are searched
_NAMED = 5  # so many entries of a checkpoint are named in an error message


def convert_sam(checkpoint: str | Path, folder: str | Path) -> SamConfig:
    """Write the folder that ``SamSegmenter.from_folder`` reads from a ``sam_vit_*.pth``: the command ``convert-sam``.

    Args:
        checkpoint: checkpoint of segment-anything: a state dict, loaded with ``weights_only=True``, or safetensors. It
            may be one entry of what a trainer saved ("model", "state_dict" or any other name, beside an optimizer),
            with a prefix before all its names ("module.", "model.sam.", …) and tensors of other modules beside them.
        folder: the folder to make.

    Returns:
        The architecture, read from the tensors' shapes.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        FileExistsError: the folder exists already.
        ValueError: the checkpoint is no SAM, or holds several; the message names what was found, or the first tensors
            that are missing, unknown or of another shape.
    """
    source = _unwrap(_read(Path(checkpoint)), str(checkpoint))
    config = _config(source, checkpoint)
    model = empty(SamModel, config)
    state = {_rename(name, config.mask_decoder_config.iou_head_depth): tensor for name, tensor in source.items()}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name != _TIED}
    check_tensors(state, wanted, str(checkpoint))
    with whole_folder(Path(folder)) as new:
        save_pretrained(model, new, state)
    return config


def _read(checkpoint: Path) -> object:
    if checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is a folder: one that transformers saved needs no conversion")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no such checkpoint: {checkpoint}")
    if checkpoint.suffix == ".safetensors":
        return read_tensors(checkpoint, "convert_sam")
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f": {found[1]}" if found else ""
        raise ValueError(
            f"{checkpoint} is not whole, or holds more than tensors, which could be any code to be run{what}; "
            "save its state dict alone"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{checkpoint} is not whole: {error}") from error


def _unwrap(content: object, where: str) -> dict[str, Tensor]:
    """Return SAM's own tensors by SAM's own names, out of whatever a trainer has wrapped around them."""
    found = {
        (*keys, name.removesuffix(_FIRST)): state
        for keys, state in _states(content)
        for name in state
        if name == _FIRST or name.endswith(f".{_FIRST}")
    }
    if not found:
        raise ValueError(f"{where} is no checkpoint of SAM: no {_FIRST} in it; it holds {_entries(content)}")
    if len(found) > 1:
        several = " and ".join(" → ".join(map(repr, place)) for place in found)
        raise ValueError(f"{where} holds more than one SAM, {several}: save the state dict of the one wanted")
    ((*_, prefix), state) = next(iter(found.items()))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _states(content: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the dicts of tensors within nested dicts, each with the keys that lead to it."""
    if not isinstance(content, Mapping) or len(keys) > _DEEP:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield keys, tensors
    for key, value in content.items():
        yield from _states(value, (*keys, str(key)))


def _entries(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    more = f" and {len(content) - _NAMED} more" if len(content) > _NAMED else ""
    return ", ".join(repr(key) for key in list(content)[:_NAMED]) + more if content else "nothing"


def _rename(name: str, depth: int) -> str:
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    if match := re.match(_HEADS, name):  # transformers names the first and the last layer of a perceptron
        layer = int(match[2])
        ours = {0: "proj_in", depth - 1: "proj_out"}.get(layer, f"layers.{layer - 1}")
        name = f"{match[1]}.{ours}.{name[match.end() :]}"
    return name


def _config(source: dict[str, Tensor], checkpoint: str | Path) -> SamConfig:
    """Return the architecture that has tensors of these shapes.

    The shapes do not tell the heads of the decoder, which are 8 in every SAM.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in source:
            raise ValueError(f"{checkpoint} is no checkpoint of SAM: {name} is missing")
        return tuple(source[name].shape)

    def count(pattern: str) -> int:
        return len({match[0] for name in source if (match := re.match(pattern, name))})

    width, _, patch, _ = shape("image_encoder.patch_embed.proj.weight")
    side = shape("image_encoder.pos_embed")[1]
    spans = [
        shape(f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(count(r"image_encoder\.blocks\.\d+\."))
    ]  # [2 · window − 1, width / heads]; the window is the whole picture where attention is global
    windows = [(span[0] + 1) // 2 for span in spans]
    decoder_width = shape("mask_decoder.iou_token.weight")[1]
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=width,
            output_channels=shape("image_encoder.neck.0.weight")[0],
            num_hidden_layers=len(spans),
            num_attention_heads=width // shape("image_encoder.blocks.0.attn.rel_pos_h")[1],
            image_size=side * patch,
            patch_size=patch,
            window_size=min(windows),
            global_attn_indexes=[i for i, window in enumerate(windows) if window == side],
            num_pos_feats=shape("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")[1],
            mlp_dim=shape("image_encoder.blocks.0.mlp.lin1.weight")[0],
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=decoder_width,
            image_size=side * patch,
            patch_size=patch,
            mask_input_channels=shape("prompt_encoder.mask_downscaling.3.weight")[0],
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=decoder_width,
            mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
            num_hidden_layers=count(r"mask_decoder\.transformer\.layers\.\d+\."),
            num_multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
            iou_head_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.\d+\."),
            iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
            layer_norm_eps=1e-5,  # the value of segment-anything; transformers' default differs
        ),
    )
