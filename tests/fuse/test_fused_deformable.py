"""Each class of multi-scale deformable attention in transformers, fused, against itself."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from fused_models import assert_equal, assert_same_bits, random_weights

import fastcss
from fastcss._fuse.deformable_attention import DeformableAttention, PixelDecoderAttention
from fastcss._fuse.fusion import fuse_modules

CLASSES = sorted(DeformableAttention.classes | PixelDecoderAttention.classes)
SHAPES = [(5, 7), (3, 4)]
WIDTH, HEADS, POINTS, QUERIES = 16, 2, 3, 9


def build(path: str):
    module, name = path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    if path in PixelDecoderAttention.classes:
        attention = cls(WIDTH, HEADS, len(SHAPES), POINTS)
    else:
        config = SimpleNamespace(d_model=WIDTH, num_feature_levels=len(SHAPES), disable_custom_kernels=True)
        config.vision_features_channels = config.encoder_hidden_dim = WIDTH
        attention = cls(config, num_heads=HEADS, n_points=POINTS)
    return random_weights(attention)


def inputs(*, box: bool = False, levels: int = len(SHAPES), masked: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in SHAPES)
    return {
        "hidden_states": torch.randn(2, QUERIES, WIDTH, generator=generator),
        "attention_mask": torch.rand(2, tokens, generator=generator) < 0.7 if masked else None,
        "encoder_hidden_states": torch.randn(2, tokens, WIDTH, generator=generator),
        "position_embeddings": torch.randn(2, QUERIES, WIDTH, generator=generator),
        "reference_points": torch.rand(2, QUERIES, levels, 4 if box else 2, generator=generator),
        "spatial_shapes": torch.tensor(SHAPES),
        "spatial_shapes_list": SHAPES,
        "level_start_index": torch.tensor([0, 35]),
    }


def assert_fused_equals(attention, given: dict, fused: bool = True) -> None:
    if "spatial_shapes" not in attention.forward.__code__.co_varnames:
        given.pop("spatial_shapes")
    expected, weights = attention(**given)
    fusion = fuse_modules(attention, linears=False)
    assert fusion.replaced == {"": "deformable_attention"}
    got, none = attention(**given)
    if fused:
        assert none is None
        assert_equal(got, expected)
    else:
        assert_same_bits((got, none), (expected, weights))


@pytest.mark.parametrize("box", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.rsplit(".", 1)[1])
def test_equals_the_module(path, box):
    assert_fused_equals(build(path), inputs(box=box))


@pytest.mark.parametrize(
    "options", [{"masked": False}, {"levels": 1}, {"levels": 1, "box": True}], ids=["no mask", "one point", "one box"]
)
@pytest.mark.parametrize("path", [CLASSES[0], CLASSES[4]])
def test_what_may_be_left_out(path, options):
    """A caller may leave out the mask, and the levels of the references if all levels have the same."""
    assert_fused_equals(build(path), inputs(**options))


def test_falls_back():
    """The model's own code must run if the level shapes would have to be read from a tensor, or if the attention
    weights are asked for."""
    path = "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoMultiscaleDeformableAttention"
    rows = [shape.unbind() for shape in torch.tensor(SHAPES)]
    assert_fused_equals(build(path), inputs() | {"spatial_shapes_list": rows}, fused=False)
    assert_fused_equals(build(path), inputs() | {"output_attentions": True}, fused=False)


def test_positional_arguments():
    path = "transformers.models.deformable_detr.modeling_deformable_detr.DeformableDetrMultiscaleDeformableAttention"
    attention, given = build(path), inputs()
    given = (*list(given.values())[:3], None, *list(given.values())[3:])
    expected = attention(*given)
    fastcss.fuse(attention)
    assert_same_bits(attention(*given), expected)


def test_gradients():
    attention, given = build(CLASSES[0]), inputs()
    wanted = [given[name].requires_grad_() for name in ("hidden_states", "encoder_hidden_states", "reference_points")]
    wanted += attention.parameters()

    def gradients():
        output = attention(**given)[0]
        return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), wanted)

    expected = gradients()
    fastcss.fuse(attention)
    assert_equal(gradients(), expected)


RESNET = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}


def deformable_detr():
    return transformers.DeformableDetrModel(
        transformers.DeformableDetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32,
            backbone_config=transformers.ResNetConfig(**RESNET, **LEVELS), encoder_layers=1, decoder_layers=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
        )
    )  # fmt: skip


def rt_detr(model=transformers.RTDetrModel, config=transformers.RTDetrConfig):
    return model(
        config(
            backbone_config=transformers.RTDetrResNetConfig(**RESNET, **LEVELS), d_model=32, encoder_hidden_dim=32,
            encoder_in_channels=[8] * 3, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_layers=2, num_queries=5,
            encoder_attention_heads=2, decoder_attention_heads=2, decoder_in_channels=[32] * 3, num_denoising=0,
        )
    )  # fmt: skip


def mask2former():
    swin = transformers.SwinConfig(
        image_size=64, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return transformers.Mask2FormerModel(
        transformers.Mask2FormerConfig(
            backbone_config=swin, hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=1,
            decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build_model", "replaced"),
    [(deformable_detr, 3), (rt_detr, 2), (mask2former, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
@torch.no_grad()
def test_whole_models(build_model, replaced):
    model = random_weights(build_model())
    given = {"pixel_values": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))}
    if build_model is deformable_detr:
        given["pixel_mask"] = torch.ones(2, 64, 96, dtype=torch.long)
        given["pixel_mask"][1, 40:] = 0
    expected = model(**given)
    fusion = fastcss.fuse(model)
    assert list(fusion.replaced.values()).count("deformable_attention") == replaced
    assert_equal(model(**given), expected)


@torch.no_grad()
def test_other_sampling_is_refused():
    model = random_weights(rt_detr(transformers.RTDetrV2Model, transformers.RTDetrV2Config))
    given = {"pixel_values": torch.randn(1, 3, 64, 64)}
    expected = model(**given)
    fusion = fuse_modules(model, linears=False)
    assert fusion.replaced == {}
    assert {"points of its own number" in reason for reason in fusion.refused.values()} == {True}
    assert len(fusion.refused) == 2
    assert_same_bits(model(**given), expected)
