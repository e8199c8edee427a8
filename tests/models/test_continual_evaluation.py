"""Tests the measure of what a model knows against label maps compared by hand, in every mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decouplecss_models import AGREE, SIZES, build
from torch.utils.data import Dataset

from fastcss.models.continual_evaluation import compare, evaluate
from fastcss.models.preprocessing import preprocess

SIDES = (64, 96)
SHAPES = ((40, 60), (60, 40), (40, 60), (50, 50), (40, 60))


@pytest.fixture(scope="module")
def model():
    return build(SIZES[:3])


@pytest.fixture(scope="module")
def labels(model) -> list[str]:
    """The data set's, in another order than the model's, and with one that the model does not know."""
    return ["background", "unknown", *reversed(model.classes)]


class Noise(Dataset):
    """Pictures of three sizes; each label map is the model's own, shifted, with a rim that does not count."""

    def __init__(self, model, labels: list[str]) -> None:
        self.items = []
        table = np.array([0, *(labels.index(name) for name in model.classes)])
        for i, shape in enumerate(SHAPES):
            image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(i))
            picture = preprocess(image, sam_side=model.segmenter.image_size, shortest=SIDES[0], longest=SIDES[1])
            found = model.segment(
                picture.pixel_values[None], picture.sam_pixel_values[None], [picture.size], crops=[picture.crop]
            )
            predicted = table[found.labels[0].numpy()]
            truth = np.roll(predicted, 3, axis=1)
            truth[:5] = 255
            self.items.append((image, torch.from_numpy(truth), predicted))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int):
        return self.items[item][:2]


@pytest.fixture(scope="module")
def data(model, labels) -> Noise:
    return Noise(model, labels)


def iou_by_hand(data: Noise, label: int) -> float:
    inside = union = 0
    for _, truth, predicted in data.items:
        counts = truth.numpy() != 255
        there, found = (truth.numpy() == label) & counts, (predicted == label) & counts
        inside, union = inside + (there & found).sum(), union + (there | found).sum()
    return inside / union if union else float("nan")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_labels_iou(model, labels, data, batch_size):
    told = []
    got = evaluate(model, data, labels, *SIDES, batch_size=batch_size, report=told.append)
    expected = torch.tensor([iou_by_hand(data, label) for label in range(len(labels))])
    assert expected.isnan()[1]
    assert ((expected > 0) & (expected < 1)).sum() >= 3
    torch.testing.assert_close(got, expected.float(), equal_nan=True)
    assert sum(told) == len(data)
    assert sorted(told) == ([1] * 5 if batch_size == 1 else [1, 1, 3])  # of one size together


def test_worker_processes_change_nothing(model, labels, data):
    before = torch.get_rng_state()
    alone, helped = (evaluate(model, data, labels, *SIDES, workers=workers) for workers in (0, 2))
    torch.testing.assert_close(helped, alone, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_modes_side_by_side(model, labels, data):
    found = compare(model, data, labels, *SIDES, modes=("one_pass", "shared", "literal"))
    assert found.equal >= AGREE
    assert set(found.iou) == set(found.seconds) == {"one_pass", "shared", "literal"}
    assert min(found.seconds.values()) > 0
    for iou in found.iou.values():
        torch.testing.assert_close(iou, found.iou["one_pass"], rtol=0, atol=1e-3, equal_nan=True)


def test_pixels_that_differ_are_counted(model, labels, data, monkeypatch):
    """One of the two modes is made to differ on six pixels of each picture."""
    segment = type(model).segment

    def other(self, *args, mode, **kwargs):
        found = segment(self, *args, mode=mode, **kwargs)
        if mode == "shared":
            for of in found.labels:
                of[:2, :3] = (of[:2, :3] + 1) % 2
        return found

    monkeypatch.setattr(type(model), "segment", other)
    changed = compare(model, data, labels, *SIDES)
    pixels = sum(height * width for height, width in SHAPES)
    assert changed.equal == pytest.approx(1 - 6 * len(SHAPES) / pixels)


def test_what_cannot_be_evaluated_is_named(model, labels, data):
    with pytest.raises(ValueError, match="the model has no task yet"):
        evaluate(build(()), data, labels, *SIDES)
    with pytest.raises(ValueError, match=r"class 'class 2\.2' is none of the data set's: background, unknown"):
        evaluate(model, data, [name for name in labels if name != "class 2.2"], *SIDES)
    with pytest.raises(ValueError, match="mode must be one of one_pass, shared, literal, got 'both'"):
        evaluate(model, data, labels, *SIDES, mode="both")
