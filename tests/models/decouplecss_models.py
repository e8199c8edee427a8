"""Makes tiny DecoupleCSS models with random weights, and pictures of noise for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, GroundingDinoConfig, GroundingDinoModel

from fastcss.models import grounding_dino
from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import DecoupleCSS, Phrases, Segmentation
from fastcss.models.sam import SamSegmenter

SIZES = (2, 1, 3, 2, 2, 1)  # classes of each task
AGREE = 0.9999  # share of the pixels, from the specification
EXACT = 1e-5  # float32, relative to the largest value: sums in another order


def phrases(classes: int, seed: int = 0, count: int = 5) -> Phrases:
    """Make phrases [c, M, 6]: [CLS], one to four words, [SEP], padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2000, 3000, (classes, count, 6), generator=generator)
    lengths = torch.randint(3, 7, (classes, count, 1), generator=generator)
    place = torch.arange(6)
    ids[..., 0] = 101
    ids[place == lengths - 1] = 102
    mask = (place < lengths).long()
    return Phrases(ids * mask, mask)


def convnext_config() -> GroundingDinoConfig:
    """Return the tiny detector's config with ConvNeXt in the place of Swin."""
    config = grounding_dino._config("tiny")
    config.backbone_config = ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], patch_size=2, out_features=["stage3", "stage4"]
    )
    config.num_feature_levels = 2
    return config


def convnext_detector() -> ClassDetector:
    """Build a detector whose blocks and fusion layers matter: untrained ones are next to nothing beside the
    residuals."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        detector = ClassDetector(GroundingDinoModel(convnext_config())).eval()
    for name, parameter in detector.named_parameters():
        if name.endswith(("vision_param", "text_param")):
            nn.init.constant_(parameter, 0.5)
        elif name.endswith("layer_scale_parameter"):
            nn.init.constant_(parameter, 1.0)
    return detector


def build(sizes: tuple[int, ...] = SIZES, sites: str = "swin+fusion", seed: int = 0) -> DecoupleCSS:
    """Build a model in eval mode, whose thresholds some classes of a picture of noise do not reach."""
    torch.manual_seed(seed)
    detector = convnext_detector() if sites == "convnext+fusion" else ClassDetector.random("tiny")
    model = DecoupleCSS(
        detector, SamSegmenter.random("tiny"), threshold=0.05, length=128, hidden=64, rank=4, sites=sites
    ).eval()
    for count in sizes:
        add_task(model, count)
    return model


def add_task(model: DecoupleCSS, classes: int) -> None:
    """Add a task whose adapter looks trained: a new one does nothing."""
    number = len(model.tasks)
    task = model.add_task([f"class {number}.{k}" for k in range(classes)], phrases(classes, number))
    task.thresholds.fill_(0.101)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.detector.named_parameters():
            if f".{task.name}." in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5 if "lora_A" in name else 0.1, generator=generator)


def pictures(batch: int, device: str = "cpu") -> dict:
    """Make arguments of ``segment``, with label maps of other sizes and pictures that fill only a part of SAM's."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(batch, 3, 64, 96, generator=generator).to(device),
        "sam_pixel_values": torch.randn(batch, 3, 128, 128, generator=generator).to(device),
        "sizes": [(64, 96), (50, 61), (131, 20)][:batch],
        "crops": [(85, 128), (128, 77), (128, 128)][:batch],
    }


def agreement(first: list[Tensor], second: list[Tensor]) -> float:
    """Find the picture with the smallest share of pixels that have the same label in both, and return the share."""
    return min((a == b).double().mean().item() for a, b in zip(first, second, strict=True))


def assert_alike(got: Segmentation, expected: Segmentation) -> None:
    assert torch.equal(got.present, expected.present)
    assert_close(got.presence, expected.presence)
    assert agreement(got.labels, expected.labels) >= AGREE


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= EXACT * expected.abs().max()
