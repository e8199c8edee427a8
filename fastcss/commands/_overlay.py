"""Draws a label map for people: its colours over the photograph, beside a legend, and a separate palette PNG."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

#: Pictures much smaller than this (in pixels) are enlarged; on larger ones the letters grow.
SIDE = 640
LONGEST_NAME = 32
PAPER, INK = (255, 255, 255), (24, 24, 27)
#: Oklab (Ottosson, 2020) maps linear sRGB to cones, and the cones' cube roots to lightness, green-red and blue-yellow.
_CONES = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))
_OKLAB = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))


class Share(NamedTuple):
    """Describes a class that a label map shows: its number k, its name, its share of the pixels, above 0 to 1."""

    index: int
    name: str
    pixels: float


def shares(labels: Tensor, classes: Sequence[str]) -> list[Share]:
    """Return the classes that ``labels`` show, in the order of ``classes``; int64 ``[H, W]``, 1 + k for class k."""
    counts = labels.flatten().bincount(minlength=len(classes) + 1)[1:]
    return [Share(k, classes[k], counts[k].item() / labels.numel()) for k in counts.nonzero()[:, 0].tolist()]


def percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


@functools.cache
def palette() -> np.ndarray:
    """Return uint8 ``[256, 3]``: black for the background, then a colour for each label.

    Each colour is the farthest from the greys and from all colours before it, among those neither so dark nor so pale
    that they would be lost on a photograph. So the first dozen differ as much as colours can, and the two most alike of
    all 255 are ten times as far apart as those of VOC's colour map.

    Source: Glasbey et al., Colour displays for categorical images, 2007; distances are those of Oklab.
    """
    levels = np.linspace(0, 255, 18).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    places = _perceived(colours)
    usable = (places[:, 0] > 0.45) & (places[:, 0] < 0.92) & (np.hypot(places[:, 1], places[:, 2]) > 0.1)
    colours, places = colours[usable], places[usable]
    distance = np.hypot(places[:, 1], places[:, 2])  # measures from the greys
    chosen = [np.zeros(3)]
    for _ in range(255):
        farthest = distance.argmax()
        chosen.append(colours[farthest])
        distance = np.minimum(distance, np.linalg.norm(places - places[farthest], axis=1))
    return np.stack(chosen).astype(np.uint8)


def label_image(labels: Tensor, classes: int) -> Image.Image:
    """Draw ``labels`` as a palette picture in the overlay's colours, or as 16-bit grey for more than 255 classes."""
    if classes > 255:
        return Image.fromarray(labels.numpy().astype(np.uint16))
    return _coloured(labels)


def overlay(image: Tensor, labels: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw the picture with its labels, and beside it a legend of the classes it shows.

    Args:
        image, labels: see ``painted``.
        classes: names of all classes.
    """
    return _beside(painted(image, labels), shares(labels, classes))


def painted(image: Tensor, labels: Tensor) -> Image.Image:
    """Draw the picture with each class in a translucent colour and an outline; enlarge a small picture.

    Args:
        image: ``[3, H, W]`` in 0…1.
        labels: int64 ``[H, W]``: 0 for background, 1 + k for class k. Colours repeat after 255.
    """
    factor = max(1, round(SIDE / max(labels.shape)))
    size = (labels.shape[1] * factor, labels.shape[0] * factor)
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    enlarged = labels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    colours = _coloured(enlarged).convert("RGB")
    picture.paste(Image.blend(picture, colours, 0.5), mask=Image.fromarray(enlarged.numpy() > 0))
    picture.paste(colours, mask=Image.fromarray(_outlines(enlarged, max(3, round(max(size) / 400)))))
    return picture


def _perceived(colours: np.ndarray) -> np.ndarray:
    """Convert colours [n, 3] in 0…255 to Oklab's lightness and twice its chroma, which weighs both alike."""
    encoded = colours / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ np.transpose(_CONES)) @ np.transpose(_OKLAB) * (1, 2, 2)


def _coloured(labels: Tensor) -> Image.Image:
    indices = torch.where(labels > 0, (labels - 1) % 255 + 1, 0).to(torch.uint8)
    picture = Image.fromarray(indices.numpy(), "P")
    picture.putpalette(palette().tobytes())
    return picture


def _outlines(labels: Tensor, width: int) -> np.ndarray:
    """Mark the outlines, bool [H, W]: a class's pixels less than ``width`` above, below or beside another label."""
    labels = labels.to(torch.int32).numpy()
    edge = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        for one, other in (
            ((slice(step, None),), (slice(None, -step),)),
            ((slice(None), slice(step, None)), (slice(None), slice(None, -step))),
        ):
            differs = labels[one] != labels[other]
            edge[one] |= differs
            edge[other] |= differs
    return edge & (labels > 0)


def _beside(picture: Image.Image, shown: list[Share]) -> Image.Image:
    """Put a legend to the right of the picture, in as many columns as needed."""
    letters = max(15, round(15 * max(picture.size) / 800))
    font, line = ImageFont.load_default(letters), round(1.6 * letters)
    rows = [(_short(share.name), percent(share.pixels)) for share in shown] or [("no class found", "")]
    names, values = (math.ceil(max(map(font.getlength, texts))) for texts in zip(*rows, strict=True))
    column = 2 * letters + names + letters + values + 2 * letters  # swatch, name, share, and room around them
    per_column = max(8, (picture.height - letters) // line)
    per_column = math.ceil(len(rows) / math.ceil(len(rows) / per_column))  # makes all columns of one length
    width = picture.width + letters + math.ceil(len(rows) / per_column) * column
    whole = Image.new("RGB", (width, max(picture.height, letters + per_column * line)), PAPER)
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for i, (name, value) in enumerate(rows):
        left = picture.width + letters + i // per_column * column
        middle = letters // 2 + line // 2 + i % per_column * line
        if shown:
            top, colour = middle - letters // 2, palette()[shown[i].index % 255 + 1]
            draw.rectangle((left, top, left + letters - 1, top + letters - 1), tuple(colour.tolist()))
        draw.text((left + 2 * letters, middle), name, INK, font, "lm")
        draw.text((left + 3 * letters + names + values, middle), value, INK, font, "rm")
    return whole


def _short(name: str) -> str:
    """Put a name on one line, without accents: Pillow's own font has only ASCII, and shows boxes for the rest."""
    letters = unicodedata.normalize("NFKD", name.encode("utf-8", "replace").decode())
    name = " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
