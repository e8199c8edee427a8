"""Tests thresholds of presence: they must be the best there are, and come from the task's own pictures."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from decouplecss_models import build
from training_scenes import LABELS, SIDES, pictures_for, single_class_trainer

from fastcss.models.class_detector import DetectedClasses
from fastcss.models.decouplecss_calibration import _presence_elsewhere, best_thresholds, calibrate
from fastcss.models.decouplecss_training import TaskTrainer, activate, detect, embed_phrases
from fastcss.models.task_pictures import TaskPictures, collate, token_shares
from fastcss.ops import select_tokens


def f1(presence: list[float], present: list[bool], threshold: float) -> float:
    found = [r > 0 and r >= threshold for r in presence]
    hits = sum(f and p for f, p in zip(found, present, strict=True))
    return 2 * hits / (sum(found) + sum(present)) if hits else 0.0


def test_thresholds_are_the_best_there_are():
    generator = torch.Generator().manual_seed(0)
    presence = torch.randint(0, 8, (12, 40), generator=generator) / 8
    present = torch.rand(12, 40, generator=generator) < presence
    thresholds = best_thresholds(presence, present)
    for k, threshold in enumerate(thresholds.tolist()):
        column = presence[:, k].tolist(), present[:, k].tolist()
        tried = {cut / 16: f1(*column, cut / 16) for cut in range(1, 17)}
        best = max(tried.values())
        assert f1(*column, threshold) == best, k
        for cut, score in tried.items():
            same = [r >= cut for r in column[0]] == [r >= threshold for r in column[0]]
            assert same or score < best or cut < threshold, k


def test_thresholds_lie_midway_and_neighbours_are_told_apart():
    low = torch.tensor(0.5)
    high = torch.nextafter(low, torch.tensor(1.0))
    presence = torch.tensor([[0.8, high, 0.7, 0.0], [0.4, low, 0.6, 0.0], [0.0, low, 0.5, 0.3]])
    present = torch.tensor([[True, True, False, True], [False, False, False, False], [True, False, False, False]])
    got = best_thresholds(presence, present)
    torch.testing.assert_close(got, torch.tensor([0.6, high, float("inf"), float("inf")]))
    assert got[1] > low


def test_calibration_sets_the_thresholds_of_its_task():
    model = build((1, 2, 1))
    task = model.tasks[1]
    pictures = pictures_for(model, 7)
    examples = [pictures[i] for i in range(7)]
    before = copy.deepcopy(model.state_dict())
    got = calibrate(model, task, pictures, batch_size=3)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"tasks.1.thresholds"}
    activate(model, task)
    phrases, whole, without = embed_phrases(model, task), [], []
    with torch.no_grad():
        for example in examples:
            tokens, classes, shapes = model.detector(example.pixel_values[None], phrases=phrases)
            rows, columns = example.crop
            shown = (example.classes[:rows, :columns] != 0)[None].double()
            shown = torch.cat([F.adaptive_avg_pool2d(shown, shape).flatten() for shape in shapes.tolist()])
            assert 0 < (shown == 0).sum() < len(shown)
            for kept, presence in ((shown >= 0, whole), (shown == 0, without)):
                found = select_tokens(tokens[:, kept], classes, threshold=model.threshold, length=1)
                presence.append(found.presence)
    present = torch.stack([example.present for example in examples])
    assert torch.cat(without).any()
    expected = best_thresholds(torch.cat([*whole, *without]), torch.cat([present, torch.zeros_like(present)]))
    torch.testing.assert_close(got, expected)
    assert torch.equal(task.thresholds, got)


@torch.no_grad()
def presence_of(trainer: TaskTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute r in each picture of a single class, [n]: of the whole picture, and without the tokens on the object."""
    task, both = trainer.task, ([], [])
    activate(trainer.model, task)
    phrases = embed_phrases(trainer.model, task)
    for i in range(len(trainer.pictures)):
        example = trainer.pictures[i]
        tokens, classes, shapes = trainer.model.detector(example.pixel_values[None], phrases=phrases)
        off = (token_shares(collate([example]), [shapes.tolist()]) == 0)[:, 0]
        for presence, some in zip(both, (tokens, tokens[:, off]), strict=True):
            presence.append(trainer.model.select(DetectedClasses(some, classes, shapes)).presence[0, 0])
    return torch.stack(both[0]), torch.stack(both[1])


def test_a_class_that_all_pictures_show_has_a_threshold_between_its_presence_on_and_off_the_objects():
    trainer = single_class_trainer(one_class_token_weight=2.0)
    while trainer.epoch < 30:
        trainer.run_epoch()
    assert all(trainer.pictures[i].present.all() for i in range(len(trainer.pictures)))
    whole, without = presence_of(trainer)
    assert 0 < without.max() < 0.5 * whole.min()  # it has learnt where the class is, and sees it elsewhere too
    (threshold,) = calibrate(trainer.model, trainer.task, trainer.pictures, batch_size=2)
    torch.testing.assert_close(threshold, (without.max() + whole.min()) / 2)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_picture_that_the_class_covers_has_nothing_without_it(ignored):
    """The same holds if the other half is ignored: the threshold must be the lowest value above nothing."""
    trainer = single_class_trainer(one_class_token_weight=0.0)
    labels = torch.full((48, 64), LABELS[0])
    labels[:, 32:] = 255 if ignored else LABELS[0]
    covered = [(trainer.pictures.dataset[i][0], labels) for i in range(3)]
    trainer.pictures = TaskPictures(covered, LABELS[:1], trainer.model.segmenter, **SIDES)
    whole, without = presence_of(trainer)
    assert (whole > 0).all()
    assert (without == 0).all()
    batch, phrases = collate([trainer.pictures[i] for i in range(3)]), embed_phrases(trainer.model, trainer.task)
    detected = detect(trainer.model, phrases, batch.pixel_values)[1]
    assert (_presence_elsewhere(trainer.model, batch, detected) == 0).all()
    (threshold,) = calibrate(trainer.model, trainer.task, trainer.pictures)
    torch.testing.assert_close(threshold, whole.min() / 2)
