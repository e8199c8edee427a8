"""Compares what ``segment`` wrote: what the model itself says of a picture, and the labels and names in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastcss.commands._overlay import palette
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.preprocessing import preprocess


def expected(model: DecoupleCSS, image: torch.Tensor, mode: str = "one_pass", **sides: int):
    made = preprocess(image, sam_side=model.segmenter.image_size, **sides)
    return model.segment(
        made.pixel_values[None], made.sam_pixel_values[None], [made.size], crops=[made.crop], mode=mode
    )


def labels_in(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == palette().flatten().tolist()
        return torch.from_numpy(np.asarray(picture).astype(np.int64))


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()
