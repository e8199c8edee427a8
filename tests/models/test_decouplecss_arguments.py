"""Tests what DecoupleCSS refuses: the message names it, and nothing is changed or computed before."""

from __future__ import annotations

import re

import pytest
import torch
from decouplecss_models import build, phrases, pictures

from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import DecoupleCSS, Phrases
from fastcss.models.sam import SamSegmenter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold must be above 0 and at most 1, got 0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"sites": "bert"}, "sites must be one of swin+fusion, convnext+fusion, fusion, got 'bert'"),
        ({"presence": "most"}, "presence must be one of all, best, got 'most'"),
        ({"confidence": "best"}, "confidence must be one of sam, presence, got 'best'"),
        (
            {"sites": "convnext+fusion"},
            "sites 'convnext+fusion' has no place in the detector's backbone, a SwinBackbone",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"DecoupleCSS: {message}")):
        DecoupleCSS(ClassDetector.random("tiny"), SamSegmenter.random("tiny"), **arguments)


def wrong_phrases(change) -> Phrases:
    given = phrases(1)
    return Phrases(change(given.input_ids), given.attention_mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "classes must be a list of at least one name, got []"),
        ({"classes": "cat"}, "classes must be a list of at least one name, got 'cat'"),
        ({"classes": ["class 0.1"]}, "class 'class 0.1' is there already"),
        ({"classes": ["new", "new"]}, "class 'new' is there already"),
        ({"name": "task0"}, "task 'task0' is there already"),
        ({"name": "a.b"}, "name must not be empty and have no dot, got 'a.b'"),
        ({"name": ""}, "name must not be empty and have no dot, got ''"),
        ({"phrases": phrases(2)}, "phrases must be [1, M, L] for these classes, ids and mask alike, got [2, 5, 6]"),
        ({"phrases": wrong_phrases(lambda ids: ids[0])}, "phrases must be [1, M, L]"),
        ({"phrases": wrong_phrases(lambda ids: ids[:, :, 1:])}, "got [1, 5, 5] and [1, 5, 6]"),
        ({"phrases": phrases(1, count=0)}, "phrases must be [1, M, L]"),
        ({"phrases": phrases(1, count=4)}, "phrases must be 5 a class, as before, got 4"),
    ],
)
def test_bad_tasks(arguments, message):
    model = build((2,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        model.add_task(**{"classes": ["new"], "phrases": phrases(1)} | arguments)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert list(model.detector.peft_config) == ["task0"]
    assert all(parameter.requires_grad for parameter in model.tasks.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode must be one of one_pass, shared, literal, got 'fast'"),
        ({"pixel_values": torch.zeros(3, 64, 96)}, "pixel_values must be [B, 3, H, W] with B ≥ 1, got [3, 64, 96]"),
        ({"pixel_values": torch.zeros(2, 1, 64, 96)}, "pixel_values must be [B, 3, H, W] with B ≥ 1"),
        ({"pixel_values": torch.zeros(0, 3, 64, 96)}, "pixel_values must be [B, 3, H, W] with B ≥ 1"),
        ({"sam_pixel_values": torch.zeros(2, 3, 64, 64)}, "sam_pixel_values must be [2, 3, 128, 128], got [2, 3, 64,"),
        ({"sam_pixel_values": torch.zeros(1, 3, 128, 128)}, "sam_pixel_values must be [2, 3, 128, 128], got [1, 3"),
        ({"sizes": [(64, 96)]}, "sizes must have one entry an image, got 1"),
        ({"crops": [(64, 96)] * 3}, "crops must have one entry an image, got 3"),
        ({"crops": [(64, 96), (64, 129)]}, "crops must be within sam_pixel_values, [128, 128], got [(64, 96), (64, 1"),
    ],
)
def test_bad_inputs(arguments, message, monkeypatch):
    model = build((1,))
    monkeypatch.setattr(model.segmenter, "embed", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(ValueError, match=re.escape(f"DecoupleCSS.segment: {message}")):
        model.segment(**pictures(2) | arguments)


def test_a_model_that_is_not_ready():
    model, given = build(()), pictures(1)
    with pytest.raises(RuntimeError, match="no task was added yet"):
        model.segment(**given)
    model.add_task(["new"], phrases(1))
    model.train()
    with pytest.raises(RuntimeError, match="wants the model in eval mode"):
        model.segment(**given)


def test_bad_sizes_of_the_models():
    with pytest.raises(ValueError, match="size must be one of swin-t, swin-b, tiny, got 'huge'"):
        ClassDetector.random("huge")
