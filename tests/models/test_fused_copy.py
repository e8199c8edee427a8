"""Tests that SAM's encoder runs fused beside itself: the same embeddings, and whatever is done to the model is seen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastcss.models.sam import SamSegmenter

EXACT = 1e-5  # float32, of the largest value


@pytest.fixture
def segmenter(device) -> SamSegmenter:
    segmenter = SamSegmenter.random("tiny").to(device).requires_grad_(False)
    for name, parameter in segmenter.named_parameters():
        if "rel_pos" in name:  # zeros in a model that has not learned
            nn.init.normal_(parameter)
    return segmenter


@pytest.fixture
def pixels(device) -> Tensor:
    return torch.randn(2, 3, 128, 128, device=device)


def assert_fused(segmenter: SamSegmenter, pixels: Tensor, before: Tensor | None = None) -> Tensor:
    """Check that both ways agree, and that neither gives what it gave ``before``."""
    plain, fused = segmenter.embed(pixels), segmenter.embed(pixels, fused=True)
    assert (fused - plain).abs().max() <= EXACT * plain.abs().max()
    assert before is None or not torch.allclose(plain, before, rtol=1e-3)
    return plain


def test_equals_the_encoder_which_stays_as_it_is(segmenter, pixels):
    classes = [type(module) for module in segmenter.modules()]
    assert_fused(segmenter, pixels)
    assert [type(module) for module in segmenter.modules()] == classes
    fused = [type(module).__name__ for module in segmenter._fused._fused.modules()]
    assert sum(name == "FusedSamVisionLayer" for name in fused) == 2


def replace_parameter(encoder: nn.Module) -> None:
    encoder.layers[1].attn.rel_pos_h = nn.Parameter(torch.randn_like(encoder.layers[1].attn.rel_pos_h))


def replace_module(encoder: nn.Module) -> None:
    encoder.layers[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda encoder: encoder.layers[0].attn.qkv.weight.data.mul_(2), id="values"),
        pytest.param(replace_parameter, id="a parameter"),
        pytest.param(replace_module, id="a module"),
        pytest.param(
            lambda encoder: encoder.layers[0].mlp.register_forward_hook(lambda module, args, out: out + 5), id="a hook"
        ),
        pytest.param(
            lambda encoder: encoder.load_state_dict(
                {name: 1.1 * value for name, value in encoder.state_dict().items()}, assign=True
            ),
            id="all parameters",
        ),
    ],
)
@torch.no_grad()
def test_a_change_of_the_encoder_is_seen(segmenter, pixels, change):
    before = assert_fused(segmenter, pixels)
    change(segmenter.model.vision_encoder)
    assert_fused(segmenter, pixels, before)


def test_another_encoder_is_seen(segmenter, pixels):
    before = assert_fused(segmenter, pixels)
    segmenter.model.vision_encoder = SamSegmenter.random("tiny", seed=1).to(pixels.device).model.vision_encoder
    assert_fused(segmenter, pixels, before)


def test_gradients_reach_the_encoder(segmenter, pixels):
    segmenter.double().requires_grad_(True)
    weight = segmenter.model.vision_encoder.layers[0].attn.qkv.weight
    plain, fused = (
        torch.autograd.grad(segmenter.embed(pixels.double(), fused=way).square().sum(), weight)[0]
        for way in (False, True)
    )
    assert plain.abs().max() > 0
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_a_copy_has_an_encoder_of_its_own(segmenter, pixels, copied):
    before = assert_fused(segmenter, pixels)
    other = copied(segmenter)
    other.model.vision_encoder.layers[0].attn.qkv.weight.mul_(3)
    assert_fused(other, pixels, before)
    torch.testing.assert_close(assert_fused(segmenter, pixels), before)
