"""Thresholds of presence: the best there are, and from the task's own pictures."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from decouplecss_models import build
from training_scenes import pictures_for

from fastcss.models.decouplecss_calibration import best_thresholds, calibrate
from fastcss.models.decouplecss_training import activate, embed_phrases
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
