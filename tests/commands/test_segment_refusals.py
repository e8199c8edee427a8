"""Tests what ``python -m fastcss segment`` refuses, and that a bad picture or a full disk spoils nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("rich")
from PIL import Image
from segmented import labels_in, names_in

from fastcss.models.decouplecss import DecoupleCSS

BAD = {
    "text.png": (lambda path: path.write_text("no picture"), "cannot identify image file"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "folder.png": (Path.mkdir, "Is a directory"),
    "missing.png": (lambda path: None, "no such file"),
    "half.png": (lambda path: path.write_bytes(path.with_name("noise.png").read_bytes()[:2000]), "truncated"),
    "32bit.tiff": (lambda path: Image.fromarray(np.ones((2, 2), np.float32)).save(path), "no known range"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named_before_the_model_is_loaded(command, run, picture, tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    shutil.rmtree(run / "base")
    finished = command("segment", tmp_path / name, "--model", run, "--out", tmp_path / "out")
    assert (finished.code, finished.out, finished.err.count("\n")) == (2, "", 1)
    assert finished.err.startswith(f"python -m fastcss segment: error: {tmp_path / name}: ")
    assert message in finished.err
    assert not (tmp_path / "out").exists()


def test_bad_pictures_leave_the_others_their_results(command, tiny_run, picture, tmp_path):
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
    shutil.copy(picture, tmp_path / "last.png")
    bad = [tmp_path / name for name in BAD]
    pictures = [*bad[:2], picture, *bad[2:], tmp_path / "last.png"]
    finished = command("segment", *pictures, "--model", tiny_run, "--out", tmp_path / "out")
    assert finished.code == 2
    assert finished.err.startswith("python -m fastcss segment: error: 6 of 8 pictures could not be labelled: ")
    for path, (_, message) in zip(bad, BAD.values(), strict=True):
        assert re.search(rf"{path}: [^;]*{message}", finished.err)
    assert names_in(tmp_path / "out") == {"noise.png", "noise_overlay.png", "last.png", "last_overlay.png"}
    assert torch.equal(*(labels_in(tmp_path / "out" / name) for name in ("noise.png", "last.png")))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory\nat line 3")])
def test_a_picture_that_cannot_be_labelled_leaves_the_others_their_results(
    command, tiny_run, picture, pixels, tmp_path, monkeypatch, error
):
    """A picture may fail because it is too large for the memory."""
    Image.fromarray(pixels[:20, :, :3]).save(tmp_path / "large.png")
    real = DecoupleCSS.segment

    def segment(model, pixel_values, sam_pixel_values, sizes, **options):
        if sizes == [(20, 48)]:
            raise error
        return real(model, pixel_values, sam_pixel_values, sizes, **options)

    monkeypatch.setattr(DecoupleCSS, "segment", segment)
    finished = command("segment", tmp_path / "large.png", picture, "--model", tiny_run, "--out", tmp_path / "out")
    reason = str(error).partition("\n")[0] or "MemoryError"
    said = f"{tmp_path / 'large.png'}: it cannot be labelled at 48×20 pixels: {reason}"
    assert finished.code == 2
    assert finished.err == f"python -m fastcss segment: error: 1 of 2 pictures could not be labelled: {said}\n"
    assert names_in(tmp_path / "out") == {"noise.png", "noise_overlay.png"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/noise.png", "b/noise.jpg"), "a/noise.png and b/noise.jpg would both be written to out/noise.png"),
        (("noise.png", "noise.png"), "noise.png and noise.png would both be written to out/noise.png"),
        (("a.png", "a_overlay.png"), "a.png and a_overlay.png would both be written to out/a_overlay.png"),
        (("out/noise.png",), "--out: out/noise.png is one of the pictures, and would be overwritten"),
        (("noise.png", "out/../out/noise_overlay.png"), "--out: out/noise_overlay.png is one of the pictures"),
    ],
)
def test_nothing_is_written_over_something_else(command, tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    finished = command("segment", *names, "--model", "nowhere", "--out", "out")
    assert (finished.code, finished.out) == (2, "")
    assert finished.err.startswith(f"python -m fastcss segment: error: {message}")
    assert names_in(tmp_path) == set()


def test_an_out_that_is_a_file_is_refused(command, tiny_run, picture, tmp_path):
    (tmp_path / "out").write_text("mine")
    finished = command("segment", picture, "--model", tiny_run, "--out", tmp_path / "out")
    assert (finished.code, finished.out) == (2, "")
    assert finished.err == f"python -m fastcss segment: error: --out: {tmp_path / 'out'} is no folder\n"
    assert (tmp_path / "out").read_text() == "mine"


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """Copies the run, to spoil it."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def no_run(run: Path) -> None:
    (run / "config.json").unlink()


def no_task(run: Path) -> None:
    for t in range(3):
        shutil.rmtree(run / f"task_{t}")


def no_base(run: Path) -> None:
    shutil.rmtree(run / "base")


def another_plan(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["training"]["colour"] = "blue"
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder: "),
        (no_run, "is no run: it has no config.json"),
        (no_task, "is a run that has learned no task yet"),
        (no_base, "no such folder: "),
        (another_plan, "colour"),
    ],
)
def test_a_bad_run_is_named(command, run, picture, tmp_path, spoil, message):
    spoil(run)
    finished = command("segment", picture, "--model", run, "--out", tmp_path / "out")
    assert (finished.code, finished.out) == (2, "")
    assert str(run) in finished.err
    assert message in finished.err
    assert not (tmp_path / "out").exists()


# ---- whole or not at all


@pytest.mark.parametrize("writes", range(4))
def test_a_full_disk_is_1_and_leaves_whole_files(command, tiny_run, picture, tmp_path, monkeypatch, writes):
    """Two pictures make four files, and each is synced to the disk before it gets its name."""
    shutil.copy(picture, tmp_path / "second.png")
    names = ["noise.png", "noise_overlay.png", "second.png", "second_overlay.png"]
    real, left = os.fsync, 2 * writes  # the file, and its folder

    def fsync(descriptor):
        nonlocal left
        if not left:
            raise OSError(28, "No space left on device")
        left -= 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    finished = command("segment", picture, tmp_path / "second.png", "--model", tiny_run, "--out", tmp_path / "out")
    assert finished.code == 1
    path = tmp_path / "out" / names[writes]
    assert finished.err == f"python -m fastcss segment: error: {path}: No space left on device\n"
    assert names_in(tmp_path / "out") == set(names[:writes])
    for name in names[:writes]:
        with Image.open(tmp_path / "out" / name) as written:
            written.load()


def test_a_folder_in_the_place_of_a_result_is_named(command, tiny_run, picture, tmp_path):
    (tmp_path / "out/noise_overlay.png").mkdir(parents=True)
    finished = command("segment", picture, "--model", tiny_run, "--out", tmp_path / "out")
    assert finished.code == 2
    there = tmp_path / "out/noise_overlay.png"
    assert finished.err.endswith(f"error: --out: {there}, which is to be written for {picture}, is a folder\n")
    assert names_in(tmp_path / "out") == {"noise_overlay.png"}  # refused before anything is labelled
