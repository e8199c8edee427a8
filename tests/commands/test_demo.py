"""Tests ``python -m fastcss demo``: its figures must be evaluation's, its picture show them; and what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from decouplecss_models import build
from PIL import Image
from rich.progress import Progress
from saved_runs import PLAN, SIDES, save_run

from fastcss.commands import _demo_measurement as measurement
from fastcss.commands._demo_figure import draw
from fastcss.commands._overlay import painted, palette
from fastcss.data import CLASS_NAMES, class_iou
from fastcss.models.continual import load_run
from fastcss.models.continual_evaluation import evaluate
from fastcss.models.continual_plan import Plan
from fastcss.models.decouplecss import MODES

COUNT = 3
LABELS = CLASS_NAMES["digits"]


@pytest.fixture(scope="module")
def loaded(digit_run):
    """Loads the model of two tasks, and its plan."""
    return load_run(digit_run)


@pytest.fixture(scope="module")
def scenes(loaded):
    return measurement.scenes_of(loaded[1], COUNT)


@pytest.fixture(scope="module")
def figures(loaded, scenes) -> measurement.Figures:
    return measurement.measure(*loaded, scenes, Progress(disable=True))


@pytest.fixture(scope="module")
def shown(loaded, scenes) -> list[measurement.Scene]:
    return [measurement.find(*loaded, *scene) for scene in scenes]


def listed(iou: torch.Tensor) -> list[float | None]:
    return [None if value != value else value for value in iou.tolist()]


# ---- what is measured


def test_iou_is_that_of_evaluation(command, loaded, scenes, figures, digit_run):
    model, plan = loaded
    assert figures.iou == listed(evaluate(model, scenes, plan.labels, plan.shortest, plan.longest))
    assert len(set(figures.iou)) > 3
    wanted = json.loads(command("evaluate", digit_run, "--json", "--test-scenes", COUNT).out)
    assert figures.miou["one_pass"] == wanted["now"]["all"]
    assert figures.tasks[1] == measurement.Learned(list(LABELS[6:]), wanted["now"]["new"])
    first = [value for value in figures.iou[1:6] if value is not None]
    assert figures.tasks[0].classes == list(LABELS[1:6])
    assert figures.tasks[0].iou == pytest.approx(sum(first) / len(first))


def test_the_modes_agree(figures):
    assert figures.equal == 1.0
    assert set(figures.miou) == set(measurement.MODES)
    assert len(set(figures.miou.values())) == 1


def test_times_are_of_every_mode(figures):
    assert list(figures.times) == list(measurement.MODES)
    for times in figures.times.values():
        assert 0 < times.least <= times.median <= times.most


def test_what_is_shown_is_what_is_measured(scenes, shown, figures):
    metric = class_iou(len(LABELS))
    for scene, (image, labels) in zip(shown, scenes, strict=True):
        assert torch.equal(scene.image, image)
        assert torch.equal(scene.labels, labels)
        metric.update(scene.found, labels)
    assert listed(metric.compute()) == figures.iou


def test_labels_are_the_data_sets(loaded, scenes):
    """The labels must be the data set's even if the model has its classes in another order."""
    model, found = build((2,)), {}
    model.tasks[0].thresholds.zero_()
    for names in (("zero", "one"), ("nine", "two")):
        model.tasks[0].classes = names
        found[names[0]] = measurement.find(model, loaded[1], *scenes[0]).found
    assert len(found["zero"].unique()) > 1
    assert torch.equal(found["nine"], torch.tensor([0, 10, 3])[found["zero"]])


def test_the_scenes_shown_have_all_classes_that_they_can(loaded):
    scenes = measurement.scenes_of(loaded[1], 30)
    chosen = measurement.to_show(scenes, range(1, 11))
    assert len(chosen) == measurement.SHOWN
    assert set(itertools.chain.from_iterable(labels.unique().tolist() for _, labels in chosen)) == set(range(11))
    only = measurement.to_show(scenes, (6,))
    assert all(set(labels.unique().tolist()) == {0, 6} for _, labels in only)
    assert len(measurement.to_show(measurement.scenes_of(loaded[1], 2), range(1, 11))) == 2


# ---- the figure


def test_the_figure_shows_it(shown, figures):
    figure = draw(shown, figures, LABELS, COUNT)
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    wanted = [
        f"{LABELS[label]}: task {1 + (label > 5)}, {100 * figures.iou[label]:.1f}%" for label in range(1, 11)
        if figures.iou[label] is not None
    ]  # fmt: skip
    assert len(legend.get_texts()) == 10
    assert set(wanted) <= {text.get_text() for text in legend.get_texts()}
    colours = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    assert colours == [tuple(colour) for colour in palette()[1:11].tolist()]
    bars = next(axes for axes in figure.axes if axes.containers)
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == pytest.approx([1000 * figures.times[mode].median for mode in measurement.MODES])
    assert f"mIoU {100 * figures.miou['one_pass']:.1f}% on 3 scenes" in figure.get_suptitle()


def test_every_picture_names_what_it_shows_but_specks(shown, figures):
    figure = draw(shown, figures, LABELS, COUNT)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 * len(shown)
    for k, panel in enumerate(panels):
        scene = shown[k % len(shown)]
        if k < len(shown):
            assert torch.equal(torch.tensor(panel.images[0].get_array().data), scene.image.permute(1, 2, 0))
            assert not panel.texts
        else:
            labels = scene.labels if k < 2 * len(shown) else scene.found
            grey = 0.5 + 0.5 * scene.image.mean(0, keepdim=True).expand(3, -1, -1)
            assert (panel.images[0].get_array().data == np.asarray(painted(grey, labels))).all()
            counts = labels.flatten().bincount(minlength=len(LABELS)).tolist()
            names = [LABELS[label] for label, count in enumerate(counts) if label and count > labels.numel() / 200]
            assert [text.get_text() for text in panel.texts] == names


# ---- the command


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_the_command_prints_the_figures_and_writes_the_picture(command, digit_run, figures, tmp_path):
    finished = command("demo", "--model", digit_run, "--out", tmp_path / "new/demo.png", "--scenes", COUNT)
    assert (finished.code, finished.err) == (0, "")
    with Image.open(tmp_path / "new/demo.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 600
    assert os.listdir(tmp_path / "new") == ["demo.png"]
    rows = [cells(line) for line in finished.out.splitlines() if line.startswith("│")]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    for t, task in enumerate(figures.tasks):
        assert rows[t] == [str(t + 1), ", ".join(task.classes), shown(task.iou)]
    assert rows[2] == ["all", "with the background", shown(figures.miou["one_pass"])]
    assert [row[0] for row in rows[3:]] == list(measurement.WAYS.values())
    assert rows[3][3] == "1.00"
    for row, miou in zip(rows[3:], figures.miou.values(), strict=True):
        least, most = map(float, row[2].split("…"))
        assert 0 < least <= float(row[1]) <= most
        assert float(row[3]) == pytest.approx(float(row[1]) / float(rows[3][1]), abs=0.1)
        assert row[4] == shown(miou)
    words = " ".join(finished.out.split())
    assert "10 classes, learned in 2 tasks, one after the other; looked for in 3 scenes" in words
    assert "the same label in all three on 100.0000% of the pixels of 3 scenes" in words


def test_a_run_that_is_not_finished_has_its_tasks(command, digit_run, tmp_path):
    run = Path(shutil.copytree(digit_run, tmp_path / "run"))
    shutil.rmtree(run / "task_1")
    finished = command("demo", "--model", run, "--out", tmp_path / "demo.png", "--scenes", 1)
    assert (finished.code, finished.err) == (0, "")
    assert "5 classes, learned in one task;" in finished.out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_keeps_the_older_figure(command, digit_run, tmp_path, monkeypatch):
    (tmp_path / "demo.png").write_text("older")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    finished = command("demo", "--model", digit_run, "--out", tmp_path / "demo.png", "--scenes", 1)
    assert finished.code == 1
    assert finished.err == f"python -m fastcss demo: error: {tmp_path / 'demo.png'}: No space left on device\n"
    assert os.listdir(tmp_path) == ["demo.png"]
    assert (tmp_path / "demo.png").read_text() == "older"


@pytest.fixture(scope="module")
def bad_runs(tiny_model, digit_models, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    untrained = save_run(build(()), folder / "untrained", PLAN)
    voc = save_run(tiny_model, folder / "voc", Plan("voc", "15-5", root="VOC2012", **SIDES))
    return {"nowhere": folder / "nowhere", "untrained": untrained, "voc": voc, "no plan": digit_models}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such folder: {run}"),
        ("untrained", "{run} is a run that has learned no task yet"),
        ("voc", "--model: {run} has learned voc, and the demo's scenes are of digits"),
        ("no plan", "{run} is a run without a plan"),
    ],
)
def test_a_run_that_will_not_do_is_named(command, bad_runs, tmp_path, name, message):
    finished = command("demo", "--model", bad_runs[name], "--out", tmp_path / "out/demo.png")
    assert (finished.code, finished.out) == (2, "")
    assert message.format(run=bad_runs[name]) in finished.err
    assert finished.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named_before_the_run_is_read(command, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for arguments, message in (
        (("--out", tmp_path / "demo.jpg"), f"--out: {tmp_path / 'demo.jpg'} must end in .png"),
        (("--out", tmp_path / "folder.png"), f"--out: {tmp_path / 'folder.png'} is a folder"),
        (("--scenes", "0"), "argument --scenes: must be a whole number from 1, got '0'"),
    ):
        finished = command("demo", "--model", "nowhere", *arguments)
        assert (finished.code, finished.out) == (2, "")
        assert message in finished.err


def test_an_out_below_a_file_is_named(command, digit_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    finished = command("demo", "--model", digit_run, "--out", tmp_path / "file/demo.png")
    assert (finished.code, finished.out) == (2, "")
    assert re.search(rf"error: {tmp_path / 'file'}: (File exists|Not a directory)", finished.err)


def test_the_modes_are_the_models():
    assert tuple(measurement.WAYS) == MODES
