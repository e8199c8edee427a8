"""Tests the published models by name, and what a continual model of them takes, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import GroundingDinoModel

from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import DecoupleCSS, Phrases
from fastcss.models.grounding_dino import SWINS, GroundingDinoEncoder
from fastcss.models.sam import VITS, SamSegmenter

pytest.importorskip("peft")

MIB = 2**20
#: The published checkpoints have so many parameters, and so have transformers' models with them.
SAM = {"vit-b": 93_735_728, "vit-l": 312_343_088, "vit-h": 641_090_864}
GROUNDING_DINO = {"swin-t": 172_118_014, "swin-b": 232_182_652}


def count(module: torch.nn.Module, of: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if of in name)


def model_of(detector: str, sam: str, tasks: tuple[int, ...], **sites) -> DecoupleCSS:
    """Build a model whose tasks have so many classes each."""
    with torch.device("meta"):
        model = DecoupleCSS(ClassDetector.random(detector), SamSegmenter.random(sam), **sites)
        for t, classes in enumerate(tasks):
            ids = torch.zeros(classes, 31, 6, dtype=torch.long)
            model.add_task([f"class {t}.{k}" for k in range(classes)], Phrases(ids, ids))
    return model


@pytest.mark.parametrize("size", VITS)
def test_sam_by_name(size):
    with torch.device("meta"):
        model = SamSegmenter.random(size)
    assert count(model) == SAM[size]
    assert (model.image_size, model.prompt_dim) == (1024, 256)
    layers = model.model.vision_encoder.layers
    whole = [i for i, layer in enumerate(layers) if layer.window_size == 0]
    assert whole == {"vit-b": [2, 5, 8, 11], "vit-l": [5, 11, 17, 23], "vit-h": [7, 15, 23, 31]}[size]


@pytest.mark.parametrize("size", SWINS)
def test_grounding_dino_by_name(size):
    """The encoder must be the published model without decoder, queries and heads."""
    with torch.device("meta"):
        encoder = GroundingDinoEncoder.random(size)
        config = encoder.encoder.config
        config.decoder_layers, config.num_queries = 6, 900
        whole = GroundingDinoModel(config)
    assert count(whole) == GROUNDING_DINO[size]
    left_out = ("decoder.", "query_position_embeddings.", "enc_output", "encoder_output_")
    assert count(encoder) == sum(p.numel() for name, p in whole.named_parameters() if not name.startswith(left_out))


@pytest.mark.parametrize("size", SWINS)
def test_the_image_tokens_of_grounding_dino(size):
    """A picture of 800 × 1333 must have four levels, the first of an eighth of its sides, and 22,223 tokens in all."""
    with torch.device("meta"):
        encoder = ClassDetector.random(size).to("meta")  # transformers makes one parameter where no context reaches
        image = encoder.embed_image(torch.empty(1, 3, 800, 1333))
    assert image.shapes == [(100, 167), (50, 84), (25, 42), (13, 21)]
    assert image.features.shape == image.positions.shape == (1, 22_223, 256)
    swin = encoder.backbone.conv_encoder.model.config
    assert swin.window_size == {"swin-t": 7, "swin-b": 12}[size]


@pytest.mark.parametrize("size", VITS)
def test_the_masks_of_sam(size):
    with torch.device("meta"):
        model = SamSegmenter.random(size)
        embeddings = model.embed(torch.empty(2, 3, 1024, 1024))
        masks, scores = model.decode(embeddings, torch.empty(5, 6, 256), counts=[3, 2])
    assert embeddings.shape == (2, 256, 64, 64)
    assert (masks.shape, scores.shape) == ((5, 256, 256), (5,))


def test_six_tasks_of_the_paper_take_what_it_says():
    """15-1 of VOC must take 22.18 MB for adapters and 8 MB per class, and 8 MB be 0.225% of the whole."""
    model = model_of("swin-b", "vit-h", (15, 1, 1, 1, 1, 1))
    adapters = count(model, "lora_")
    assert adapters == 6 * 983_040
    assert adapters * 4 / MIB == 22.5
    generators = sum(p.numel() for p in model.tasks.parameters() if p.dim() > 2)  # biases are not counted
    assert generators == 20 * 2_097_152
    whole = 4 * (SAM["vit-h"] + GROUNDING_DINO["swin-b"] + adapters + generators) / MIB
    assert round(whole) == 3514
    assert 8 / whole == pytest.approx(0.00225, rel=0.02)
    assert 22.18 / whole == pytest.approx(0.0062, rel=0.02)


@pytest.mark.parametrize(("detector", "mib"), [("swin-t", 41.9), ("swin-b", 75.4)])
def test_adapters_in_the_image_encoder_are_an_option(detector, mib):
    model = model_of(detector, "tiny", (1, 1), sites="swin+fusion")
    assert round(3 * count(model, "lora_") * 4 / MIB, 1) == mib  # three times two tasks
