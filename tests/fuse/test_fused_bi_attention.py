"""The fusion attention of Grounding DINO and MM Grounding DINO, fused, against itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from fused_models import assert_equal, assert_same_bits, random_weights
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import MMGroundingDinoBiMultiHeadAttention

import fastcss
from fastcss._fuse.fusion import fuse_modules

CLASSES = pytest.mark.parametrize("cls", [GroundingDinoBiMultiHeadAttention, MMGroundingDinoBiMultiHeadAttention])


def build(cls, dropout: float = 0.0):
    config = {"d_model": 16, "encoder_ffn_dim": 48, "encoder_attention_heads": 6, "fusion_dropout": dropout}
    return random_weights(cls(SimpleNamespace(**config)))


def inputs(masks: str = "both", dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(3, n, 16, generator=generator).to(dtype) for n in (40, 7))
    image_mask, text_mask = (torch.rand(3, n, generator=generator) < 0.3 for n in (40, 7))
    text_mask[:, 0] = image_mask[:, 0] = False
    return image, text, image_mask if masks in ("image", "both") else None, text_mask if masks == "both" else None


@CLASSES
@pytest.mark.parametrize("masks", ["none", "image", "both"])
@torch.no_grad()
def test_equals_the_module(cls, masks):
    attention, given = build(cls), inputs(masks)
    (image, _), (text, _) = attention(*given)
    fusion = fuse_modules(attention, linears=False)
    assert fusion.replaced == {"": "bi_attention"}
    (got_image, image_weights), (got_text, text_weights) = attention(*given)
    assert image_weights is text_weights is None
    assert_equal((got_image, got_text), (image, text))
    names = ("vision_features", "text_features", "vision_attention_mask", "text_attention_mask")
    assert_same_bits(attention(**dict(zip(names, given, strict=True))), ((got_image, None), (got_text, None)))


@torch.no_grad()
def test_logits_that_are_clamped():
    """These logits are far apart: one that is more than 50,000 below the largest must count as 50,000 below."""
    attention, given = build(GroundingDinoBiMultiHeadAttention), inputs()
    attention.vision_proj.weight *= 2e3
    attention.text_proj.weight *= 1e3
    (image, _), (text, _) = attention(*given)
    fastcss.fuse(attention)
    (got_image, _), (got_text, _) = attention(*given)
    assert_equal((got_image, got_text), (image, text), 1e-4)


@CLASSES
def test_training_with_dropout_falls_back(cls):
    attention, given = build(cls, dropout=0.5).train(), inputs()
    fused = copy.deepcopy(attention)
    fuse_modules(fused, linears=False)
    outputs = []
    for each in (attention, fused):
        torch.manual_seed(0)
        outputs.append(each(*given))
    assert_same_bits(*outputs)
    assert fused.eval()(*given)[0][1] is None


def test_gradients():
    attention, (image, text, *masks) = build(GroundingDinoBiMultiHeadAttention), inputs()
    names = [name for name, _ in attention.named_parameters() if name != "text_proj.bias"]  # 0 but for rounding
    wanted = [image.requires_grad_(), text.requires_grad_(), *map(attention.get_parameter, names)]

    def gradients():
        (image_out, _), (text_out, _) = attention(image, text, *masks)
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in (image_out, text_out))
        return torch.autograd.grad(loss, wanted)

    expected = gradients()
    fastcss.fuse(attention)
    assert_equal(gradients(), expected)


@torch.no_grad()
def test_bfloat16(tolerances):
    """The fused module must be no further from the float64 module than the module's own bfloat16 is."""
    attention, given = build(GroundingDinoBiMultiHeadAttention), inputs(dtype=torch.bfloat16)
    exact = copy.deepcopy(attention).double()(given[0].double(), given[1].double(), *given[2:])
    own = attention.bfloat16()(*given)
    fastcss.fuse(attention)
    for got, mine, right in zip(attention(*given), own, exact, strict=True):
        assert got[0].dtype == torch.bfloat16
        error, allowed = ((output[0] - right[0]).norm() / right[0].norm() for output in (got, mine))
        assert error <= 1.1 * allowed + tolerances[torch.bfloat16]
