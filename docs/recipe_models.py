"""Builds the small models that docs/make_recipes.py adapts: transformers' own classes, with random weights.

None of them drops anything, so that its training can be compared with a loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

SIDE = 32  # of a picture
ATTENTION = ["q_proj", "v_proj"]
_PICTURES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
_WORDS = torch.tensor([[98, 5, 7, 3, 99], [98, 3, 4, 7, 99], [98, 8, 5, 2, 99]])


class Model(NamedTuple):
    """A model to adapt.

    Attributes:
        build: makes it.
        head: the modules that a recipe saves whole (``modules_to_save``).
        targets: the layers that its recipes adapt.
        words: the name of its word embedding, whose rows a recipe trains, if it has one.
        given: inputs, a batch of three.
    """

    build: Callable[[], nn.Module]
    head: list[str]
    targets: list[str] | str = ATTENTION
    words: str | None = None
    given: Mapping[str, Tensor] = {"pixel_values": _PICTURES}


def still(model: nn.Module) -> nn.Module:
    """Switch off all that drops something in training."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, num_labels=5, **_sizes())
    return transformers.ViTForImageClassification(config)


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(image_size=SIDE, patch_size=8, num_labels=5, mlp_ratio=2, **_sizes())
    return transformers.Dinov2ForImageClassification(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def upernet() -> nn.Module:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, patch_size=2, layer_scale_init_value=1.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[2], auxiliary_in_channels=16, auxiliary_channels=8,
        num_labels=5,
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(), hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=4,
        num_labels=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=5, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, d_model=32, encoder_hidden_dim=32, encoder_in_channels=[8] * 3, encoder_ffn_dim=32,
        decoder_ffn_dim=32, decoder_layers=2, num_queries=5, encoder_attention_heads=2, decoder_attention_heads=2,
        decoder_in_channels=[32] * 3, num_denoising=0, num_labels=5,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


def clip() -> nn.Module:
    text = {**_sizes(), "vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 98, "eos_token_id": 99}
    vision = {**_sizes(), "image_size": SIDE, "patch_size": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=16)
    )


def sam() -> nn.Module:
    vision = transformers.SamVisionConfig(
        hidden_size=32, output_channels=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=32, image_size=SIDE,
        patch_size=8, window_size=2, global_attn_indexes=[1], num_pos_feats=16,
    )  # fmt: skip
    prompts = transformers.SamPromptEncoderConfig(hidden_size=32, image_size=SIDE, patch_size=8, mask_input_channels=4)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
    )
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = transformers.SamModel(config)
    for module in model.modules():  # at transformers' initial values the image hardly reaches the masks
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    return model


def grounding_dino() -> nn.Module:
    text = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=_swin(["stage1", "stage2"]), text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10,
        num_feature_levels=3, max_text_len=16,
    )  # fmt: skip
    model = transformers.GroundingDinoForObjectDetection(config)
    for layer in model.model.encoder.layers:  # the tasks would hardly differ at the initial 1e-4
        nn.init.constant_(layer.fusion_layer.vision_param, 0.5)
        nn.init.constant_(layer.fusion_layer.text_param, 0.5)
    model.config.tie_word_embeddings = False  # PEFT looks for those that are tied, and a detector has none
    return model


def _sizes() -> dict:
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def _swin(out_features: list[str] | None = None) -> transformers.SwinConfig:
    return transformers.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=2,
        out_features=out_features or ["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


MODELS = {
    "ViT, classification": Model(vit, ["classifier"]),
    "DINOv2, classification": Model(dinov2, ["classifier"]),
    "SegFormer": Model(segformer, ["decode_head"]),
    "UperNet with ConvNeXt": Model(upernet, ["decode_head"], ["pwconv1", "pwconv2"]),
    "Mask2Former": Model(mask2former, ["class_predictor"]),
    "DETR": Model(detr, ["class_labels_classifier", "bbox_predictor"]),
    "RT-DETR": Model(rt_detr, ["enc_score_head"]),
    "CLIP": Model(clip, ["visual_projection"], words="token_embedding", given={
        "pixel_values": _PICTURES, "input_ids": _WORDS}),
    "SAM": Model(sam, ["mask_decoder"], ["qkv"], given={
        "pixel_values": _PICTURES, "input_points": torch.tensor([[[[5.0, 9.0]]]] * 3)}),
    "Grounding DINO": Model(grounding_dino, ["text_projection"], words="word_embeddings", given={
        "pixel_values": _PICTURES, "input_ids": torch.tensor([[101, 300, 301, 1012, 302, 1012, 102]] * 3)}),
}  # fmt: skip
