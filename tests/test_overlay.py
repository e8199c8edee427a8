"""Tests label maps as pictures: which colours stand where, and what the legend says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image, ImageDraw

from fastcss.commands import _overlay
from fastcss.commands._overlay import INK, PAPER, Share, label_image, overlay, palette, percent, shares

NAMES = ("cat", "dog", "street sign")


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Records every text that is drawn."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, *rest):
        texts.append(text)
        draw(self, xy, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def blocks(height: int, width: int) -> torch.Tensor:
    """Make a map with background above, and classes 0 and 2 side by side below."""
    labels = torch.zeros(height, width, dtype=torch.int64)
    labels[height // 2 :, : width // 2] = 1
    labels[height // 2 :, width // 2 :] = 3
    return labels


def noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


# ---- colours


def test_colours_are_fixed_and_all_differ():
    colours = palette()
    assert (colours.shape, colours.dtype) == ((256, 3), np.uint8)
    assert colours[:6].tolist() == [[0, 0, 0], [255, 0, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0], [120, 45, 180]]
    assert len(np.unique(colours, axis=0)) == 256


def test_the_most_alike_are_ten_times_as_far_apart_as_vocs():
    bits = np.arange(1, 256)[:, None] >> 3 * np.arange(3)[:, None, None]  # of the index, three by three
    voc = sum(((bits[i] >> np.arange(3)) & 1) << 7 - i for i in range(3))
    assert voc[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]

    def nearest(colours):
        places = _overlay._perceived(colours.astype(np.float64))
        distances = np.linalg.norm(places[:, None] - places, axis=-1)
        return distances[~np.eye(len(colours), dtype=bool)].min()

    assert nearest(palette()[1:]) > 10 * nearest(voc)
    assert nearest(palette()[1:21]) > 4 * nearest(voc[:20])


def test_perceived_colours_are_those_of_oklab():
    """White and the blue must be as Oklab's author tabulates them; chroma is doubled."""
    white, blue = _overlay._perceived(np.array([[255.0] * 3, [0, 0, 255]]))
    np.testing.assert_allclose(white, [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(blue, [0.452, 2 * -0.032, 2 * -0.312], atol=2e-3)


# ---- label maps


@pytest.mark.parametrize("classes", [3, 255])
def test_a_label_map_is_palette_indices(classes, tmp_path):
    labels = blocks(5, 8)
    labels[0, 0] = classes
    label_image(labels, classes).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert (picture.mode, picture.size) == ("P", (8, 5))
        assert np.array_equal(np.asarray(picture), labels.numpy())
        assert np.array_equal(np.asarray(picture.convert("RGB")), palette()[labels.numpy()])


def test_more_labels_than_a_palette_has_are_16_bit_grey(tmp_path):
    labels = torch.arange(300).reshape(20, 15)
    label_image(labels, 299).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.mode == "I;16"
        assert np.array_equal(np.asarray(picture), labels.numpy())


# ---- shares


def test_shares_are_of_what_is_there():
    labels = torch.tensor([[0, 3, 3, 3], [0, 1, 0, 0]])
    assert shares(labels, NAMES) == [Share(0, "cat", 0.125), Share(2, "street sign", 0.375)]
    assert shares(torch.zeros(2, 2, dtype=torch.int64), NAMES) == []


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0%"), (1e-9, "<0.1%"), (0.001, "0.1%"), (0.12345, "12.3%"), (1, "100.0%")]
)
def test_percentages(share, text):
    assert percent(share) == text


# ---- overlays


@pytest.mark.parametrize(("size", "factor"), [((128, 128), 5), ((300, 200), 2), ((640, 500), 1), ((1, 1), 640)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size, factor):
    whole = np.asarray(overlay(noise(*size), torch.zeros(size, dtype=torch.int64), NAMES))
    height, width = size[0] * factor, size[1] * factor
    assert whole.shape[0] == height
    assert (whole[:, width] == PAPER).all()
    assert not (whole[:, width - 1] == PAPER).all()


def test_colours_lie_on_their_classes():
    image, labels = noise(900, 1000), blocks(900, 1000)
    whole = np.asarray(overlay(image, labels, NAMES)).astype(int)
    picture = (image * 255).round().permute(1, 2, 0).int().numpy()
    assert np.array_equal(whole[:450, :1000], picture[:450])
    for k, columns in ((0, slice(10, 490)), (2, slice(510, 990))):
        colour = palette()[k + 1].astype(int)
        inside = whole[460:900, columns]
        assert abs(2 * inside - picture[460:900, columns] - colour).max() <= 2  # half of each, rounded
        assert (whole[450:453, columns] == colour).all()  # the outline
        assert not (whole[453, columns] == colour).all()
    assert (whole[500:, 497:500] == palette()[1]).all()
    assert (whole[500:, 500:503] == palette()[3]).all()


def test_one_pixel_of_a_class_shows_when_enlarged():
    labels = torch.zeros(128, 128, dtype=torch.int64)
    labels[7, 9] = 2
    whole = np.asarray(overlay(torch.full((3, 128, 128), 0.5), labels, NAMES))
    assert (whole[35:40, 45:50] == palette()[2]).all()
    assert (whole[[34, 40], 45:50] == 128).all()


def test_the_legend_is_of_the_classes_shown(written):
    labels = blocks(120, 100)
    whole = np.asarray(overlay(noise(120, 100), labels, NAMES))
    assert written == ["cat", "25.0%", "street sign", "25.0%"]
    legend = whole[:, 500:].reshape(-1, 3)
    for label, there in ((1, True), (2, False), (3, True)):
        assert (legend == palette()[label]).all(1).any() == there
    assert (legend == INK).all(1).any()


def test_a_picture_of_no_class_says_so(written):
    overlay(noise(20, 30), torch.zeros(20, 30, dtype=torch.int64), NAMES)
    assert "no class found" in written


def test_a_long_legend_has_columns_within_the_picture(written):
    labels = (torch.arange(150).repeat_interleave(1000) + 1).reshape(300, 500)
    whole = overlay(noise(300, 500), labels, [f"class {k}" for k in range(150)])
    assert whole.height == 300
    assert written[::2] == [f"class {k}" for k in range(150)]
    colours = {tuple(colour) for colour in np.asarray(whole)[:, 500:].reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in palette()[1:151].tolist()} <= colours


@pytest.mark.parametrize("size", [(1, 700), (3, 2000)])
def test_a_low_picture_makes_room_for_its_legend(size, written):
    labels = torch.arange(size[0] * size[1]).reshape(size) % 6
    whole = np.asarray(overlay(noise(*size), labels, [f"class {k}" for k in range(5)]))
    assert len(written) == 10
    assert whole.shape[0] > size[0]
    assert (whole[-1] == PAPER).all()
    assert (whole[:, -1] == PAPER).all()


def test_letters_grow_with_the_picture():
    labels = blocks(1500, 2000)
    large, small = (np.asarray(overlay(noise(*of.shape), of, NAMES)) for of in (labels, labels[::4, ::4]))
    swatches = [(of == palette()[1]).all(-1)[:, side:].sum() for of, side in ((large, 2000), (small, 500))]
    assert swatches == [38**2, 15**2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Löwenzahn", "Lowenzahn"), ("猫", "猫"), ("two\nlines", "two lines"), ("", ""), ("\ud800", "?"),
        ("\x00", "\x00"), ("n" * 32, "n" * 32), ("n" * 33, "n" * 31 + "…"),
    ],
)  # fmt: skip
def test_any_name_can_be_drawn(name, text, written):
    overlay(noise(8, 8), torch.ones(8, 8, dtype=torch.int64), [name])
    assert written[0] == text


def test_colours_repeat_after_255(written):
    labels = torch.tensor([[0, 1, 256, 300]])
    whole = np.asarray(overlay(noise(1, 4), labels, [f"class {k}" for k in range(300)]))
    assert written[::2] == ["class 0", "class 255", "class 299"]
    assert (whole[0, [160, 320, 480]] == palette()[[1, 1, 45]]).all()
