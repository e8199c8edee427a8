"""Tests ``train`` and ``evaluate`` on pictures in PASCAL VOC's layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from continual_runs import lines
from PIL import Image

from fastcss.commands.train import _begin, _notes, add_arguments
from fastcss.models.continual import read_plan
from fastcss.models.continual_plan import DEFAULTS


@pytest.fixture
def voc(tmp_path, monkeypatch) -> Path:
    """Writes three pictures to train on, one of them from the Semantic Boundaries Dataset, and two to test on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, random = tmp_path / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, names in (("train", "ab"), ("train_aug", "abc"), ("val", "de")):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    for number, (name, label) in enumerate(zip("abcde", (3, 20, 12, 3, 20), strict=True)):
        shape = (30, 40) if number % 2 else (40, 30)
        labels = np.zeros(shape, np.uint8)
        labels[5:25, 5:25], labels[25] = label, 255
        Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            Image.fromarray(labels).save(root / f"{folder}/{name}.png")
    return root


def test_voc_from_its_folder(command, digit_models, voc, tmp_path, monkeypatch):
    plan = DEFAULTS["voc"].plan
    assert (plan["shortest"], plan["longest"]) == (800, 1333)
    for side in ("shortest", "longest"):  # pictures of the paper's size take 1 GB here
        monkeypatch.setitem(plan, side, plan[side] // 5)
    run = tmp_path / "run"
    arguments = ("--data", "voc", "--setting", "19-1", "--root", voc, "--base", digit_models, "--rank", 2)
    finished = command("train", *arguments, "--epochs", "1", "--out", run)
    assert (finished.code, finished.err) == (0, "")
    out = " ".join(finished.out.split())
    assert "it learns from the pictures of VOC's list train_aug" in out
    assert (
        "task 2: of one class, which every picture of the task shows; the token loss (weight 1) tells where it is not"
        in out
    )
    plan = read_plan(run)
    assert (plan.root, plan.train_split, plan.train_scenes) == (str(voc.resolve()), "train_aug", None)
    assert (plan.recipe.batch_size, plan.shortest, plan.longest) == (24, 160, 266)
    first, last, summary = lines(run)
    assert first["classes"][2] == "bird"
    assert last["classes"][-1] == "tv monitor"
    assert {label for label, value in enumerate(last["iou"]) if value is not None} >= {0, 3, 20}
    assert (summary["data"], summary["train_split"], summary["train_pictures"]) == ("voc", "train_aug", 3)
    assert first["loss"]["tokens"] == 0 < last["loss"]["tokens"]

    (elsewhere := tmp_path / "moved").mkdir()
    voc.rename(elsewhere / "VOC2012")
    finished = command("evaluate", run)
    assert finished.code == 2
    assert f"no pictures of VOC 2012 at {voc}" in finished.err
    got = json.loads(command("evaluate", run, "--root", elsewhere, "--json").out)
    assert list(got["iou"].values()) == last["iou"]


def test_a_short_list_is_learned_from_only_when_asked_for(command, digit_models, voc, tmp_path):
    (voc / "ImageSets/Segmentation/train_aug.txt").unlink()
    run = tmp_path / "run"
    arguments = ("--data", "voc", "--setting", "10-10", "--root", voc, "--base", digit_models, "--rank", 2)
    finished = command("train", *arguments, "--epochs", "1", "--out", run)
    assert (finished.code, finished.out, run.exists()) == (2, "", False)
    for part in (
        "10,582 pictures of train_aug.txt",
        f"of {voc} there is neither, there are train, val",
        "--voc-list",
    ):
        assert part in finished.err
    finished = command("train", *arguments, "--voc-list", "train_aug", "--out", run)
    assert (finished.code, run.exists()) == (2, False)
    assert f"looked for {voc.resolve()}/ImageSets/Segmentation/train_aug.txt" in finished.err

    add_arguments(parser := argparse.ArgumentParser())
    _begin(parser.parse_args([*map(str, arguments), "--voc-list", "train", "--out", str(run)]))
    plan = read_plan(run)
    assert (plan.train_split, len(plan.training_data())) == ("train", 2)
    assert _notes(plan) == ["it learns from the pictures of VOC's list train"]
    finished = command("train", "--voc-list", "train_aug", "--out", run)
    assert (finished.code, finished.out) == (2, "")
    assert "was begun with train_split 'train', and is to go on with 'train_aug'" in finished.err
