"""Writes label maps as PASCAL VOC has them, palette pictures, and says what those of three small images show."""

import numpy as np
from PIL import Image

LABELS = {"2007_000001": [[0, 1], [15, 255]], "2007_000002": [[20, 20], [0, 0]], "2007_000003": [[0, 0], [0, 255]]}
PALETTE = [channel for index in range(256) for channel in (index, 255 - index, index // 2)]


def write_labels(path, rows, mode="P"):
    picture = Image.fromarray(np.array(rows, np.uint8))
    if mode == "P":
        picture.putpalette(PALETTE)
    picture.save(path)
