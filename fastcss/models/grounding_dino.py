"""Runs Grounding DINO up to its feature enhancer, the part that a model adapts, and says where adapters sit in it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoModel, PreTrainedConfig, SwinConfig
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoEncoderOutput,
    generate_masks_with_special_tokens_and_transfer_map,
)

from .checkpoint import cast, check_dtype, load_pretrained

if TYPE_CHECKING:
    from typing_extensions import Self

#: The encoder has these parts of a ``GroundingDinoModel``.
PARTS = ("backbone", "input_proj_vision", "text_backbone", "text_projection", "encoder", "level_embed")

#: DecoupleCSS puts its adapters here, as PEFT ``target_modules``. A name is matched from its start, which keeps the
#: text backbone and the text enhancer out.
_FUSION = r"encoder\..*\.fusion_layer\.attn\.(values_)?(vision|text)_proj"
LORA_SITES = {
    "swin+fusion": rf"(backbone\..*\.[qkv]_proj|{_FUSION})",
    "convnext+fusion": rf"(backbone\..*\.pwconv[12]|{_FUSION})",
    "fusion": _FUSION,
}


#: The published models have these backbones.
SWINS = {
    "swin-t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin-b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
}

#: Six phrases of arbitrary word ids, for models with random weights, which know no words.
EXAMPLE_PHRASES = ((2311,), (3712, 2204), (3392,), (2300, 3011, 2050), (2711,), (2813, 2795))
_CLS, _SEP, _STOP = 101, 102, 1012


@dataclasses.dataclass
class TextFeatures:
    """Holds what the feature enhancer needs of a text of L tokens. Masks are True where a token must *not* be read."""

    features: Tensor  # [B, L, D]
    mask: Tensor  # bool [B, L]
    self_mask: Tensor  # bool [B, L, L]; a token reads its own phrase only
    position_ids: Tensor  # int64 [B, L], counted within a phrase


@dataclasses.dataclass
class ImageFeatures:
    """Holds what the feature enhancer needs of an image, with all levels flattened to N tokens."""

    features: Tensor  # [B, N, D]
    positions: Tensor  # [B, N, D]
    mask: Tensor  # bool [B, N], True on padding
    shapes: list[tuple[int, int]]  # (height, width) of each level
    valid_ratios: Tensor  # [B, levels, 2], share of a level's (width, height) that is no padding


class GroundingDinoEncoder(nn.Module):
    """Runs the backbone, BERT and the feature enhancer of a ``GroundingDinoModel``, without its decoder and heads.

    The three parts are separate methods, since a caller may bring its own text features.
    Parameter names are those of ``GroundingDinoModel``.
    """

    def __init__(self, model: GroundingDinoModel) -> None:
        super().__init__()
        self.max_text_len = model.config.max_text_len
        self._least_side = _least_side(model.config.backbone_config)
        self.backbone = model.backbone
        self.input_proj_vision = model.input_proj_vision
        self.text_backbone = model.text_backbone
        self.text_projection = model.text_projection
        self.encoder = model.encoder
        self.level_embed = model.level_embed
        self.register_buffer("special_tokens", model.special_tokens, persistent=False)

    @classmethod
    def from_folder(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load the encoder from a checkpoint folder of transformers; safetensors only, no network.

        Args:
            folder: folder of the checkpoint.
            dtype: dtype to compute in, whatever the folder's; in 16 bits the text encoder stays in float32.
        """
        check_dtype(f"{cls.__name__}.from_folder", dtype)
        encoder = cls(load_pretrained(GroundingDinoModel, folder, parts=PARTS, dtype=torch.float32)).eval()
        cast(encoder, dtype)
        return encoder

    @classmethod
    def random(
        cls,
        size: str = "swin-t",
        *,
        seed: int = 0,
        fusion_scale: float = 0.5,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Make an encoder with random weights.

        Args:
            size: "swin-t" or "swin-b", the shapes of the published models, whose folders are called tiny and base (the
                paper's storage tells that it has "swin-b"); or "tiny", for tests.
            seed: seed of the weights; the global generator is left as it was.
            fusion_scale: value for the enhancer's learned residual scale. Untrained it is 1e-4, at which image and
                text, and with them the tasks, hardly affect each other.
            dtype: as for ``from_folder``; the weights are drawn in float32.
        """
        check_dtype(f"{cls.__name__}.random", dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = cls(GroundingDinoModel(_config(size))).eval()
        for name, parameter in encoder.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                nn.init.constant_(parameter, fusion_scale)
        cast(encoder, dtype)
        return encoder

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_mask: Tensor | None = None,
    ) -> GroundingDinoEncoderOutput:
        """Enhance image ``[B, 3, H, W]`` and text ``[B, L]`` → image tokens ``[B, N, D]``, text tokens ``[B, L, D]``.

        A text longer than the model's ``max_text_len`` is cut to that, with a warning.
        """
        text = self.embed_text(input_ids, attention_mask, token_type_ids)
        return self.enhance(self.embed_image(pixel_values, pixel_mask), text)

    def embed_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TextFeatures:
        """Run BERT so that every phrase (between the special tokens) reads only itself.

        A text of more than ``max_text_len`` tokens is cut to that, with a warning. It is cut as in
        ``GroundingDinoModel``, after the tokens were assigned to phrases, so that a phrase at the cut keeps its
        positions. (That model cuts silently; ``GroundingDinoForObjectDetection`` cannot run such a text at all.)
        """
        length = self.max_text_len
        if input_ids.shape[1] > length and not torch.compiler.is_compiling():
            warnings.warn(
                f"GroundingDinoEncoder: the text has {input_ids.shape[1]} tokens, and the model reads {length}: what "
                "comes after them is cut off. Split the phrases into several texts to have all of them read.",
                stacklevel=2,
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_type_ids = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        readable, position_ids = generate_masks_with_special_tokens_and_transfer_map(input_ids, self.special_tokens)
        input_ids, attention_mask, token_type_ids, position_ids = (
            of[:, :length] for of in (input_ids, attention_mask, token_type_ids, position_ids)
        )
        readable = readable[:, :length, :length]
        hidden = self.text_backbone(input_ids, readable[:, None], token_type_ids, position_ids).last_hidden_state
        features = self.text_projection(hidden).to(self.level_embed.dtype)
        return TextFeatures(features, ~attention_mask.bool(), ~readable, position_ids)

    def embed_image(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ImageFeatures:
        """Project the backbone's feature maps to D channels, and make coarser levels from the last of them.

        A picture with a side too small for a ConvNeXt's strides is filled up with padding, which is masked.
        """
        if pixel_mask is None:
            pixel_mask = torch.ones(
                pixel_values.shape[0], *pixel_values.shape[-2:], dtype=torch.long, device=pixel_values.device
            )
        if self._least_side > 1:
            height, width = (max(0, self._least_side - side) for side in pixel_values.shape[-2:])
            pixel_values, pixel_mask = (
                nn.functional.pad(of, (0, width, 0, height)) if height or width else of
                for of in (pixel_values, pixel_mask)
            )
        maps, positions = self.backbone(pixel_values, pixel_mask)
        last = maps[-1][0]
        levels, masks = [], []
        for level, project in enumerate(self.input_proj_vision):
            if level < len(maps):
                source, mask = maps[level]
                source = project(source)
            else:
                source = project(last if level == len(maps) else levels[-1])
                mask = nn.functional.interpolate(pixel_mask[None].float(), size=source.shape[-2:])[0].bool()
                positions.append(self.backbone.position_embedding(source, mask).to(source.dtype))
            levels.append(source)
            masks.append(mask)
        flat = [level.flatten(2).transpose(1, 2) for level in levels]
        positions = [
            position.flatten(2).transpose(1, 2) + embed
            for position, embed in zip(positions, self.level_embed, strict=True)
        ]
        return ImageFeatures(
            features=torch.cat(flat, 1),
            positions=torch.cat(positions, 1),
            mask=~torch.cat([mask.flatten(1) for mask in masks], 1),
            shapes=[tuple(level.shape[-2:]) for level in levels],
            valid_ratios=torch.stack([_valid_ratio(mask, flat[0].dtype) for mask in masks], 1),
        )

    def enhance(self, image: ImageFeatures, text: TextFeatures) -> GroundingDinoEncoderOutput:
        """Run the feature enhancer: image and text tokens read each other, layer by layer."""
        sizes = [height * width for height, width in image.shapes]
        device = image.features.device
        return self.encoder(
            vision_features=image.features,
            vision_attention_mask=image.mask,
            vision_position_embedding=image.positions,
            spatial_shapes=torch.tensor(image.shapes, device=device),
            spatial_shapes_list=image.shapes,
            level_start_index=torch.tensor([sum(sizes[:level]) for level in range(len(sizes))], device=device),
            valid_ratios=image.valid_ratios,
            text_features=text.features,
            text_attention_mask=text.mask,
            text_self_attention_masks=text.self_mask,
            text_position_ids=text.position_ids,
            return_dict=True,
        )


def phrases_to_ids(phrases: Sequence[Sequence[int]] = EXAMPLE_PHRASES) -> tuple[Tensor, list[slice]]:
    """Return ``[CLS] phrase . phrase . … [SEP]`` as ids ``[1, L]``, and the slice of each phrase in it."""
    ids = [_CLS, *itertools.chain.from_iterable((*phrase, _STOP) for phrase in phrases), _SEP]
    starts = itertools.accumulate((len(phrase) + 1 for phrase in phrases), initial=1)
    spans = [slice(start, start + len(phrase)) for start, phrase in zip(starts, phrases, strict=False)]
    return torch.tensor([ids]), spans


def add_adapters(encoder: nn.Module, tasks: int, rank: int = 32, sites: str = "fusion", seed: int = 0) -> nn.Module:
    """Make a PEFT model of ``encoder`` with random adapters ``task0`` …; B is random too, as zeros would do nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_SITES[sites])
    model = get_peft_model(encoder, config, adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
            parameter.data.normal_(0, scale, generator=generator)
    return model.eval()


def _least_side(backbone: PreTrainedConfig) -> int:
    """Return a picture's least side in pixels: ConvNeXt needs all its strides; Swin pads what its own do not divide."""
    if backbone.model_type not in ("convnext", "convnextv2"):
        return 1
    return backbone.patch_size * 2 ** (len(backbone.depths) - 1)


def _valid_ratio(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the share of a level's (width, height) that is picture; ``mask`` is True there, [B, h, w] → [B, 2]."""
    height, width = mask.shape[-2:]
    return torch.stack([mask[:, 0].sum(1, dtype=dtype) / width, mask[:, :, 0].sum(1, dtype=dtype) / height], -1)


def _config(size: str) -> GroundingDinoConfig:
    levels = ["stage2", "stage3", "stage4"]
    # The decoder is built and dropped; one layer and one query keep that cheap.
    if size in SWINS:
        swin = SwinConfig(**SWINS[size], out_features=levels)
        return GroundingDinoConfig(backbone_config=swin, text_config=BertConfig(), decoder_layers=1, num_queries=1)
    if size == "tiny":
        swin = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4], window_size=4, out_features=levels)
        bert = BertConfig(
            vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        return GroundingDinoConfig(
            backbone_config=swin, text_config=bert, d_model=64, encoder_layers=2, encoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, num_queries=1,
        )  # fmt: skip
    raise ValueError(f"GroundingDinoEncoder: size must be one of {', '.join(SWINS)}, tiny, got {size!r}")
