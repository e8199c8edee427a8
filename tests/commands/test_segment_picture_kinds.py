"""Tests which pictures ``python -m fastcss segment`` reads: every format, depth, orientation and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("rich")
from decouplecss_models import build
from PIL import Image
from saved_runs import PLAN, SIDES, save_run
from segmented import expected, labels_in

from fastcss.data import read_image

KINDS = {
    "one pixel": lambda pixels: Image.fromarray(pixels[:1, :1, :3]),
    "one row": lambda pixels: Image.fromarray(pixels[:1, :, :3]),
    "16 bits": lambda pixels: Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    "alpha": Image.fromarray,
    "grey": lambda pixels: Image.fromarray(pixels[..., 0]),
    "palette": lambda pixels: Image.fromarray(pixels[..., :3]).quantize(16),
    "two colours": lambda pixels: Image.fromarray(pixels[..., 0]).convert("1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_png_is_read(command, tiny_model, tiny_run, pixels, tmp_path, kind):
    picture = tmp_path / "of a kind.png"
    KINDS[kind](pixels).save(picture)
    finished = command("segment", picture, "--model", tiny_run, "--out", tmp_path / "out")
    assert (finished.code, finished.err) == (0, "")
    image = read_image(picture)
    found = expected(tiny_model, image, **SIDES)
    assert torch.equal(labels_in(tmp_path / "out/of a kind.png"), found.labels[0])
    assert found.labels[0].shape == image.shape[1:]


def test_other_formats_are_read_and_a_film_gives_its_first_picture(command, tiny_model, tiny_run, pixels, tmp_path):
    frames = [Image.fromarray(pixels[..., k]) for k in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(pixels, "CMYK").save(tmp_path / "print.jpg")
    pictures = [tmp_path / "film.gif", tmp_path / "print.jpg"]
    assert command("segment", *pictures, "--model", tiny_run, "--out", tmp_path / "out").code == 0
    for picture in pictures:
        found = expected(tiny_model, read_image(picture), **SIDES)
        assert torch.equal(labels_in(tmp_path / f"out/{picture.stem}.png"), found.labels[0])
    assert np.array_equal((read_image(pictures[0])[0] * 255).round().numpy(), pixels[..., 0])


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_on_its_side_is_labelled_upright(command, tiny_model, tiny_run, pixels, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels[..., :3]).save(tmp_path / "camera.jpg", exif=exif)
    with Image.open(tmp_path / "camera.jpg") as stored:
        upright = np.rot90(np.asarray(stored), {3: 2, 6: -1}[orientation]).copy()
    found = expected(tiny_model, torch.from_numpy(upright / np.float32(255)).permute(2, 0, 1), **SIDES)
    assert command("segment", tmp_path / "camera.jpg", "--model", tiny_run, "--out", tmp_path / "out").code == 0
    assert torch.equal(labels_in(tmp_path / "out/camera.png"), found.labels[0])


def test_long_pictures_are_labelled_whatever_the_backbone(command, pixels, tmp_path):
    """A ConvNeXt's strides would leave nothing of the short side of these pictures."""
    model = build((2, 1), sites="convnext+fusion")
    run = save_run(model, tmp_path / "run", PLAN)
    shapes = [(2, 48), (36, 1), (3, 3), (36, 48)]
    pictures = [tmp_path / f"{height} by {width}.png" for height, width in shapes]
    for picture, (height, width) in zip(pictures, shapes, strict=True):
        Image.fromarray(pixels[:height, :width, :3]).save(picture)
    finished = command("segment", *pictures, "--model", run, "--out", tmp_path / "out")
    assert (finished.code, finished.err) == (0, "")
    for picture, shape in zip(pictures, shapes, strict=True):
        found = expected(model, read_image(picture), **SIDES)
        labels = labels_in(tmp_path / "out" / picture.name)
        assert labels.shape == shape
        assert torch.equal(labels, found.labels[0])
