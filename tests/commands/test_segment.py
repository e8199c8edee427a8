"""Tests ``python -m fastcss segment``: it must write what the model says, and bad pictures must spoil nothing."""

from __future__ import annotations

import dataclasses
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
from decouplecss_models import build
from PIL import Image
from saved_runs import PLAN, SIDES, save_run

from fastcss.commands import segment
from fastcss.commands._overlay import overlay, palette, percent
from fastcss.data import read_image
from fastcss.models.continual import load_run
from fastcss.models.decouplecss import MODES, DecoupleCSS
from fastcss.models.decouplecss_folder import load
from fastcss.models.preprocessing import preprocess


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """[36, 48, 4], with some transparency."""
    return np.random.default_rng(0).integers(0, 256, (36, 48, 4), dtype=np.uint8)


@pytest.fixture
def picture(pixels, tmp_path) -> Path:
    Image.fromarray(pixels[..., :3]).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def expected(model: DecoupleCSS, image: torch.Tensor, mode: str = "one_pass", **sides: int):
    made = preprocess(image, sam_side=model.segmenter.image_size, **sides)
    return model.segment(
        made.pixel_values[None], made.sam_pixel_values[None], [made.size], crops=[made.crop], mode=mode
    )


def labels_in(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert picture.getpalette() == palette().flatten().tolist()
        return torch.from_numpy(np.asarray(picture).astype(np.int64))


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()


# ---- what is written


@pytest.mark.parametrize("mode", MODES)
def test_the_label_map_and_the_overlay_are_the_models(command, tiny_model, tiny_run, picture, tmp_path, mode):
    finished = command("segment", picture, "--model", tiny_run, "--out", tmp_path / "new/out", "--mode", mode)
    assert (finished.code, finished.err) == (0, "")
    image = read_image(picture)
    found = expected(tiny_model, image, mode, **SIDES)
    assert len(found.labels[0].unique()) > 2
    assert torch.equal(labels_in(tmp_path / "new/out/noise.png"), found.labels[0])
    with Image.open(tmp_path / "new/out/noise_overlay.png") as drawn:
        whole = overlay(image, found.labels[0], tiny_model.classes)
        assert np.array_equal(np.asarray(drawn), np.asarray(whole))
    assert names_in(tmp_path / "new/out") == {"noise.png", "noise_overlay.png"}


def test_what_is_printed_is_what_was_found(command, tiny_model, tiny_run, picture, tmp_path):
    out = tmp_path / "out"
    finished = command("segment", picture, "--model", tiny_run, "--out", out)
    found = expected(tiny_model, read_image(picture), **SIDES)
    first, *tasks = finished.out.splitlines()
    wanted = rf"{picture}: 48×36 pixels, \d+\.\d\d s → {out / 'noise.png'}, {out / 'noise_overlay.png'}"
    assert re.fullmatch(wanted, first)
    lines = []
    for task in tiny_model.tasks:
        texts = []
        for k in map(tiny_model.classes.index, task.classes):
            if found.present[0, k]:
                share = (found.labels[0] == 1 + k).double().mean().item()
                presence = found.presence[0, k].item()
                texts.append(f"{tiny_model.classes[k]} (presence {presence:.2f}, {percent(share)} of pixels)")
        lines.append(f"  {task.name}: {', '.join(texts) or 'nothing'}")
    assert tasks == lines
    assert 0 < found.present.sum() < found.present.numel()


def test_a_run_without_a_plan_has_the_papers_sides(command, tiny_model, picture, tmp_path):
    run = save_run(tiny_model, tmp_path / "run")
    assert command("segment", picture, "--model", run, "--out", tmp_path / "out").code == 0
    found = expected(tiny_model, read_image(picture), shortest=800, longest=1333)
    assert torch.equal(labels_in(tmp_path / "out/noise.png"), found.labels[0])


def test_a_naive_run_has_the_last_adapter(command, tiny_model, picture, tmp_path):
    run = save_run(tiny_model, tmp_path / "run", dataclasses.replace(PLAN, method="naive"))
    assert command("segment", picture, "--model", run, "--out", tmp_path / "out").code == 0
    naive, own = (expected(model, read_image(picture), **SIDES) for model in (load_run(run)[0], load(run)))
    assert torch.equal(labels_in(tmp_path / "out/noise.png"), naive.labels[0])
    assert not torch.equal(naive.presence, own.presence)


def test_older_results_are_overwritten(command, tiny_run, picture, tmp_path):
    arguments = ("segment", picture, "--model", tiny_run, "--out", tmp_path / "out")
    command(*arguments)
    first = labels_in(tmp_path / "out/noise.png")
    (tmp_path / "out/noise.png").write_bytes(b"old")
    assert command(*arguments).code == 0
    assert torch.equal(labels_in(tmp_path / "out/noise.png"), first)


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


# ---- what is refused


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


# ---- arguments


def test_the_modes_are_the_models():
    assert segment.MODES == MODES


def test_more_classes_than_a_palette_has(command, tmp_path, picture):
    """Label maps have 16 bits then."""
    model = build((1, 258))
    run = save_run(model, tmp_path / "run", PLAN)
    assert command("segment", picture, "--model", run, "--out", tmp_path / "out").code == 0
    found = expected(model, read_image(picture), **SIDES)
    with Image.open(tmp_path / "out/noise.png") as written:
        assert written.mode == "I;16"
        assert np.array_equal(np.asarray(written), found.labels[0].numpy())
