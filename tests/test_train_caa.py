"""Tests the training benchmark on a few steps: it must run, and its arms differ in nothing but the module."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from benchmarks import train_caa
from fastcss.data import CLASSES, DigitScenes


def test_a_few_steps_of_both_arms(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    options = {"--start-steps": 3, "--steps": 2, "--batch": 4, "--scenes": 12, "--test-scenes": 6, "--out": out}
    code = train_caa.main(["--seeds", "4", "5", *(str(word) for option in options.items() for word in option)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["seed"], row["arm"]) for row in rows] == [(4, "FCN"), (4, "FCN + CAA"), (5, "FCN"), (5, "FCN + CAA")]
    for base, ours in train_caa.pairs(rows):
        assert base["miou_at_start"] == ours["miou_at_start"]
        assert ours["parameters"] > base["parameters"]
    for row in rows:
        assert row["steps"] == 2
        assert 0 <= row["miou"] <= 1
        assert row["miou"] == pytest.approx(sum(row["iou"].values()) / 11)
        assert list(row["iou"]) == list(CLASSES)
    assert code == (0 if all(ours["miou"] > base["miou"] for base, ours in train_caa.pairs(rows)) else 1)
    assert "difference" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_model():
    settings = train_caa.Settings(channels=16)
    scenes = train_caa.rendered(DigitScenes("train", 8), lambda: None)
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        model = train_caa.FCN(16)
        model.add_context("auto")
        train_caa.train(model, scenes, 2, 1e-3, 1, settings, lambda: None)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_every_scene_comes_once_an_epoch():
    scenes = (torch.arange(10, dtype=torch.uint8)[:, None], torch.arange(10, dtype=torch.uint8))
    seen = torch.cat([labels for _, labels in train_caa.batches(scenes, 5, 4, seed=0)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_iou_is_that_of_the_definition():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 11, 16, 16)
            logits[:, 3, 8:] = -1
            logits[:, 3, :8] = 1
            return logits

    labels = torch.zeros(60, 128, 128, dtype=torch.uint8)  # two of the evaluation's batches
    labels[:, :32] = 3
    labels[:, :, :16] = 7
    images = torch.zeros(60, 3, 128, 128, dtype=torch.uint8)
    truth, found = labels[0], torch.zeros(128, 128)
    found[:64] = 3
    expected = [0.0] * 11
    for c in (0, 3, 7):
        a, b = truth == c, found == c
        expected[c] = ((a & b).sum() / (a | b).sum()).item()
    assert train_caa.iou(Fixed(), (images, labels)).tolist() == pytest.approx(expected)
