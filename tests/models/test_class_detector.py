"""Tests ClassDetector: what its masks hide, and what the phrases of a class are made of."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from decouplecss_models import assert_close, phrases
from transformers import GroundingDinoModel

from fastcss.models.class_detector import ClassDetector
from fastcss.models.grounding_dino import _config
from fastcss.ops import phrase_pool


@pytest.fixture(scope="module")
def detector(device) -> ClassDetector:
    return ClassDetector.random("tiny").to(device).requires_grad_(False)


@pytest.fixture
def image(device):
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def embedded(device):
    """Makes phrases [3, 5, D] of three classes, far from each other."""
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(device)


def test_shapes_and_that_all_of_it_matters(detector, image, embedded):
    tokens, classes, shapes = detector(image, phrases=embedded)
    assert shapes.tolist() == [[8, 12], [4, 6], [2, 3], [1, 2]]
    count = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert tokens.shape == (3, count, 64)
    assert classes.shape == (3, 3, 64)
    others = detector(image, phrases=-embedded)
    assert (others.tokens - tokens).abs().max() > 1e-3  # the image reads the classes
    assert (detector(image.flip(0), phrases=embedded).classes - classes).abs().max() > 1e-3  # and the other way round


@pytest.mark.parametrize("places", [[0, 1, 2], [1, 2, 4]])
def test_masked_rows_are_zeros_and_change_nothing(detector, image, embedded, places):
    """Masked rows must give zeros and change nothing, whatever their values are."""
    junk = 3 * torch.randn(5, 5, 64, device=image.device)
    junk[places] = embedded
    mask = torch.ones(5, dtype=torch.bool, device=image.device)
    mask[places] = False
    padded, expected = detector(image, phrases=junk, class_mask=mask), detector(image, phrases=embedded)
    assert not padded.classes[:, mask].any()
    assert_close(padded.classes[:, places], expected.classes)
    assert_close(padded.tokens, expected.tokens)


def test_a_batch_is_its_images_one_by_one(detector, image, embedded):
    together = detector(image, phrases=embedded)
    for b in range(3):
        one = detector(image[b : b + 1], phrases=embedded)
        assert_close(together.tokens[b : b + 1], one.tokens)
        assert_close(together.classes[b : b + 1], one.classes)


def test_classes_in_another_order(detector, image, embedded):
    """Each class is a separate phrase at the same position, so the order of the classes must not matter."""
    order = [2, 0, 1]
    got, expected = detector(image, phrases=embedded[order]), detector(image, phrases=embedded)
    assert_close(got.classes, expected.classes[:, order])
    assert_close(got.tokens, expected.tokens)


def test_what_stands_on_padding_changes_nothing(detector, image, embedded, monkeypatch):
    seen = torch.ones(3, 64, 96, dtype=torch.long, device=image.device)
    seen[0, 40:], seen[1, :, 50:] = 0, 0
    features = detector.embed_image(image, seen)
    assert features.mask[:2].any(1).all()
    assert not features.mask[2].any()
    expected = detector(image, phrases=embedded, pixel_mask=seen)
    assert (detector(image, phrases=embedded).classes - expected.classes)[:2].abs().max() > 1e-4
    junk = torch.where(features.mask[..., None], 3 * torch.randn_like(features.features), features.features)
    monkeypatch.setattr(detector, "embed_image", lambda *_: dataclasses.replace(features, features=junk))
    got = detector(image, phrases=embedded, pixel_mask=seen)
    assert_close(got.classes, expected.classes)
    assert_close(got.tokens[~features.mask], expected.tokens[~features.mask])


def test_phrases_are_pooled_by_the_mean_of_the_image(detector, image, embedded, monkeypatch):
    seen = torch.ones(3, 64, 96, dtype=torch.long, device=image.device)
    seen[0, 40:] = 0
    features = detector.embed_image(image, seen)
    means = torch.stack([f[~m].mean(0) for f, m in zip(features.features, features.mask, strict=True)])
    given = []
    enhance = detector.enhance
    monkeypatch.setattr(detector, "enhance", lambda image, text: given.append(text) or enhance(image, text))
    detector(image, phrases=embedded, pixel_mask=seen)
    assert_close(given[0].features, phrase_pool(means, embedded, impl="reference"))


def test_phrases_are_the_mean_of_their_words(detector, device):
    made = phrases(3)
    ids, mask = made.input_ids.to(device), made.attention_mask.to(device)
    got = detector.embed_phrases(ids, mask)
    assert got.shape == (3, 5, 64)
    for k in range(3):
        for m in range(5):
            length = int(mask[k, m].sum())
            alone = detector.text_backbone(ids[k, m, None, :length]).last_hidden_state
            words = detector.text_projection(alone)[0, 1 : length - 1]  # between [CLS] and [SEP]
            assert len(words) == length - 2
            assert_close(got[k, m], words.mean(0))


def test_folder_round_trip(tmp_path):
    torch.manual_seed(0)
    model = GroundingDinoModel(_config("tiny"))
    model.save_pretrained(tmp_path)
    loaded, state = ClassDetector.from_folder(str(tmp_path)), ClassDetector(model).state_dict()
    assert not loaded.training
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is not read
    with pytest.raises(OSError, match=re.escape("model.safetensors")):
        ClassDetector.from_folder(str(tmp_path))


def test_a_phrase_without_words_is_zeros(detector, device):
    ids = torch.tensor([[[101, 102, 0], [101, 2311, 102]]], device=device)
    embedded = detector.embed_phrases(ids, (ids > 0).long())
    assert not embedded[0, 0].any()
    assert embedded[0, 1].any()
