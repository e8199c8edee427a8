"""Tests pictures for both models against the models' own processors, which transformers builds on Pillow."""

from __future__ import annotations

import pytest
import torch
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from fastcss.models.preprocessing import STD, preprocess

SIZES = [(375, 500), (500, 333), (120, 120), (40, 300), (37, 53)]
#: Their processors round the resized picture to 8 bits, and Pillow its weights to 22 and its first pass to 8.
ROUNDING = 1.5 / 255 / min(STD)


def picture(height: int, width: int) -> torch.Tensor:
    """Draw a picture of 8 bits, smooth enough that resizing keeps something of it."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_sam_reads_what_its_own_processor_makes(size):
    image = picture(*size)
    processor = SamImageProcessorPil(size={"longest_edge": 256}, pad_size={"height": 256, "width": 256})
    expected = processor(image.numpy(), return_tensors="pt")
    got = preprocess(image / 255, sam_side=256, shortest=64)
    assert got.size == tuple(expected["original_sizes"][0].tolist()) == size
    assert got.crop == tuple(expected["reshaped_input_sizes"][0].tolist())
    assert (got.sam_pixel_values - expected["pixel_values"][0]).abs().max() < ROUNDING
    height, width = got.crop
    assert (got.sam_pixel_values[:, height:] == 0).all()
    assert (got.sam_pixel_values[:, :, width:] == 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sides", [(200, 333), (96, 5000)])
def test_detector_reads_what_its_own_processor_makes(size, sides):
    image = picture(*size)
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": sides[0], "longest_edge": sides[1]})
    expected = processor(image.numpy(), return_tensors="pt")["pixel_values"][0]
    got = preprocess(image / 255, sam_side=64, shortest=sides[0], longest=sides[1]).pixel_values
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < ROUNDING


def test_published_sizes():
    got = preprocess(torch.rand(3, 480, 640))
    assert got.pixel_values.shape == (3, 800, 1066)
    assert got.sam_pixel_values.shape == (3, 1024, 1024)
    assert got.crop == (768, 1024)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1)])
def test_a_side_of_one_pixel(size):
    got = preprocess(torch.rand(3, *size), sam_side=128, shortest=64, longest=96)
    assert min(*got.pixel_values.shape, *got.crop) >= 1
    assert got.sam_pixel_values.isfinite().all()
    assert got.pixel_values.isfinite().all()


def test_what_is_no_picture_is_refused():
    with pytest.raises(TypeError, match="preprocess: image must be floating point"):
        preprocess(torch.zeros(3, 8, 8, dtype=torch.uint8))
    for shape in ((8, 8), (4, 8, 8), (3, 0, 8)):
        with pytest.raises(ValueError, match=r"preprocess: image must be \[3, H, W\]"):
            preprocess(torch.zeros(shape))
