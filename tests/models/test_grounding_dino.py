"""Tests the detector's encoder: the model's own arithmetic, its checkpoints, and where adapters sit."""

import dataclasses
import warnings

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from decouplecss_models import convnext_detector  # noqa: E402

from fastcss.models import grounding_dino  # noqa: E402
from fastcss.models.grounding_dino import GroundingDinoEncoder, add_adapters, phrases_to_ids  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return transformers.GroundingDinoModel(grounding_dino._config("tiny")).eval()


@pytest.fixture(scope="module")
def padded_batch():
    ids = phrases_to_ids([(5, 6), (7,)])[0].repeat(2, 1)
    pixel_mask = torch.ones(2, 97, 130, dtype=torch.long)
    pixel_mask[1, 80:] = pixel_mask[1, :, 100:] = 0
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -3:] = 0
    pixels = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "input_ids": ids, "pixel_mask": pixel_mask, "attention_mask": attention_mask}


@torch.no_grad()
def test_the_encoder_is_the_models_own(tiny, padded_batch):
    whole, part = tiny(**padded_batch), GroundingDinoEncoder(tiny)(**padded_batch)
    torch.testing.assert_close(part.last_hidden_state_vision, whole.encoder_last_hidden_state_vision, rtol=0, atol=0)
    torch.testing.assert_close(part.last_hidden_state_text, whole.encoder_last_hidden_state_text, rtol=0, atol=0)


@torch.no_grad()
def test_an_encoder_comes_back_from_a_checkpoint_folder(tiny, padded_batch, tmp_path):
    tiny.save_pretrained(tmp_path)
    back = GroundingDinoEncoder.from_folder(tmp_path)(**padded_batch)
    expected = GroundingDinoEncoder(tiny)(**padded_batch)
    assert torch.equal(back.last_hidden_state_vision, expected.last_hidden_state_vision)


@pytest.mark.parametrize("length", [250, 256, 257, 282, 600])
@torch.no_grad()
def test_a_long_text_is_cut_as_the_model_cuts_it(tiny, length):
    """A phrase at the cut must keep the positions that it has in the whole text."""
    ids = torch.randint(2000, 3000, (2, length), generator=torch.Generator().manual_seed(length))
    ids[:, 0], ids[:, -1], ids[0, 4::4], ids[1, 7::11] = 101, 102, 1012, 1012
    given = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["attention_mask"][1, 200:] = 0
    whole, encoder = tiny(**given), GroundingDinoEncoder(tiny)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        part = encoder(**given)
    assert torch.equal(part.last_hidden_state_text, whole.encoder_last_hidden_state_text)
    assert torch.equal(part.last_hidden_state_vision, whole.encoder_last_hidden_state_vision)
    texts = [str(warning.message) for warning in said if "GroundingDinoEncoder" in str(warning.message)]
    assert [f"the text has {length} tokens, and the model reads 256" in text for text in texts] == [True] * (
        length > 256
    )


@pytest.mark.parametrize("size", [(7, 90), (90, 1), (3, 3)])
@torch.no_grad()
def test_a_picture_too_thin_for_a_convnext_is_padded(size):
    detector = convnext_detector()
    side = detector._least_side
    assert side == 16
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    wide = [max(side, of) for of in size]
    padded, seen = torch.zeros(1, 3, *wide), torch.zeros(1, *wide, dtype=torch.long)
    padded[..., : size[0], : size[1]], seen[:, : size[0], : size[1]] = pixels, 1
    got, expected = detector.embed_image(pixels), detector.embed_image(padded, seen)
    assert got.shapes == expected.shapes
    assert got.mask.any()
    assert not got.mask.all()
    for first, second in zip(dataclasses.astuple(got), dataclasses.astuple(expected), strict=True):
        if isinstance(first, torch.Tensor):
            assert first.isfinite().all()
            assert torch.equal(first, second)


def test_random_encoders_follow_their_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first, again, other = (GroundingDinoEncoder.random("tiny", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.randn(3), expected)
    name = "encoder.layers.0.fusion_layer.attn.vision_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert torch.all(first.get_parameter("encoder.layers.0.fusion_layer.vision_param") == 0.5)


@pytest.mark.parametrize(("sites", "layers"), [("swin+fusion", 4 * 3 + 2 * 4), ("fusion", 2 * 4)])
def test_adapters_sit_where_they_should(sites, layers):
    model = add_adapters(GroundingDinoEncoder.random("tiny"), tasks=2, rank=4, sites=sites)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == layers
    assert not any("text_backbone" in name or "text_enhancer" in name for name in adapted)
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_adapters_sit_where_they_should_in_a_convnext():
    model = add_adapters(convnext_detector(), tasks=2, rank=4, sites="convnext+fusion").base_model.model
    backbone = "backbone.conv_encoder.model.encoder.stages.{}.layers.0.pwconv{}"
    fusion = "encoder.layers.{}.fusion_layer.attn.{}_proj"
    expected = {backbone.format(stage, layer) for stage in range(4) for layer in (1, 2)}
    kinds = ("vision", "text", "values_vision", "values_text")
    expected |= {fusion.format(layer, kind) for layer in range(2) for kind in kinds}
    assert {name for name, module in model.named_modules() if hasattr(module, "lora_A")} == expected


def test_phrases_stand_where_the_spans_say():
    ids, spans = phrases_to_ids([(5, 6), (7,)])
    assert ids.tolist() == [[101, 5, 6, 1012, 7, 1012, 102]]
    assert [ids[0, span].tolist() for span in spans] == [[5, 6], [7]]


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of swin-t, swin-b, tiny, got 'huge'"):
        GroundingDinoEncoder.random("huge")
