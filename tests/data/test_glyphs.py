"""Tests the glyph scenes: what a scene depends on, what is in it, and that glyphs can be told apart."""

import sys

import pytest
import torch
from scene_checks import assert_item_form, assert_same_in_worker_processes

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from fastcss.data import GlyphScenes, _scenes, glyphs


def test_items_have_the_promised_form():
    scenes = GlyphScenes(40, glyphs=30)
    assert len(scenes) == 40
    seen, counts = set(), set()
    for image, labels in scenes:
        assert_item_form(image, labels, classes=31)
        assert labels.min() == 0
        shown = set(labels.unique().tolist()) - {0}
        counts.add(len(shown))
        seen |= shown
    assert counts == {1, 2, 3}
    assert len(seen) > 20
    assert GlyphScenes(5, glyphs=1)[4][1].unique().tolist() == [0, 1]


def test_a_scene_follows_from_seed_and_number_alone():
    scenes = GlyphScenes(6, glyphs=30, seed=3)
    _ = scenes[1]
    for image, other in zip(scenes[4], GlyphScenes(50, glyphs=30, seed=3)[4], strict=True):
        assert torch.equal(image, other)
    backwards = [scenes[i] for i in reversed(range(6))][::-1]
    assert all(torch.equal(image, other) for (image, _), (other, _) in zip(scenes, backwards, strict=True))
    for image, _ in (scenes[5], GlyphScenes(6, glyphs=30, seed=4)[4]):
        assert not torch.equal(image, scenes[4][0])


def test_worker_processes_give_the_same_scenes():
    assert_same_in_worker_processes(GlyphScenes(7, glyphs=30, seed=1))


def test_torchs_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    _ = GlyphScenes(1, glyphs=30)[0]
    assert torch.equal(torch.randn(3), expected)


def test_labels_are_where_a_picture_differs_from_its_background(monkeypatch):
    scenes = GlyphScenes(40, glyphs=30, seed=2)
    whole = list(scenes)
    monkeypatch.setattr(glyphs, "put", lambda *_: None)  # the background is drawn before it is called
    labelled, areas, contrasts = [], [], []
    for (image, labels), (behind, _) in zip(whole, scenes, strict=True):
        changed, ink = (image - behind).abs().amax(0), labels > 0
        near = torch.nn.functional.max_pool2d(ink.float()[None, None], 9, 1, 4)[0, 0].bool()  # edges are soft
        labelled.append(near[changed > 0].float().mean())
        assert labelled[-1] > 0.9  # where it is faintest, a thin stroke has no label
        assert (changed[ink] > 0.1).float().mean() > 0.9  # a colour is chosen that stands out in so many pixels
        contrasts.append(changed[ink].mean())
        areas += labels.flatten().bincount()[1:].tolist()
    assert torch.stack(labelled).mean() > 0.99
    assert torch.stack(contrasts).mean() > 0.35
    assert min(area for area in areas if area) >= 20


def test_drawings_of_a_glyph_are_alike_and_no_two_the_same():
    sheets = torch.stack([glyphs.drawings(label) for label in range(1, 61)])
    assert sheets.shape == (60, 16, 8, 8)
    assert sheets.dtype == torch.float32
    assert 0 <= sheets.min() <= sheets.max() <= 1
    assert (sheets.amax((2, 3)) >= 0.5).all()  # thinner ones would leave no label
    flat = sheets.flatten(2).flatten(0, 1)
    distance = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert distance.min() > 0
    glyph = torch.arange(60).repeat_interleave(16)
    assert (glyph[distance.argmin(1)] == glyph).float().mean() > 0.9
    same = glyph[:, None] == glyph
    among = distance[same & distance.isfinite()].mean()
    assert among < 0.5 * distance[~same].mean()


def test_glyphs_are_the_same_whatever_the_seed_and_in_every_process():
    assert torch.equal(glyphs.drawings(7), glyphs.drawings.__wrapped__(7))
    assert not torch.equal(glyphs.drawings(7), glyphs.drawings(8))
    mean = torch.stack([glyphs.drawings(label).mean() for label in (1, 2, 3)])
    torch.testing.assert_close(
        mean, torch.tensor([0.1603394, 0.4593506, 0.355896]), rtol=1e-5, atol=0
    )  # models were trained on these


def test_items_outside_are_an_index_error_and_negative_ones_count_from_the_end():
    scenes = GlyphScenes(3, glyphs=30)
    assert torch.equal(scenes[-1][0], scenes[2][0])
    for item in (3, -4):
        with pytest.raises(IndexError):
            scenes[item]
    assert list(GlyphScenes(0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "GlyphScenes: count must be at least 0, got -1"),
        ({"glyphs": 0}, "GlyphScenes: glyphs must be at least 1, got 0"),
        ({"seed": -2}, "GlyphScenes: seed must be at least 0, got -2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlyphScenes(**{"count": 2} | arguments)


@pytest.mark.parametrize("missing", ["sklearn", "PIL"])
def test_a_missing_package_names_the_extra(missing, monkeypatch):
    _scenes.photographs.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.* is not installed: pip install 'fastcss\[data\]'"):
        GlyphScenes(1)
