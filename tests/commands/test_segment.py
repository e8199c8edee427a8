"""Tests ``python -m fastcss segment``: it must write what the model says."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("rich")
from decouplecss_models import build
from PIL import Image
from saved_runs import PLAN, SIDES, save_run
from segmented import expected, labels_in, names_in

from fastcss.commands import segment
from fastcss.commands._overlay import overlay, percent
from fastcss.data import read_image
from fastcss.models.continual import load_run
from fastcss.models.decouplecss import MODES, DecoupleCSS
from fastcss.models.decouplecss_folder import load


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_computes_in_the_dtype_asked_for(command, tiny_run, picture, tmp_path, dtype, monkeypatch):
    seen, segment_pictures = [], DecoupleCSS.segment

    def noted(self, *args, **kwargs):
        seen.append(self.segmenter.dtype)
        return segment_pictures(self, *args, **kwargs)

    monkeypatch.setattr(DecoupleCSS, "segment", noted)
    assert command("segment", picture, "--model", tiny_run, "--out", tmp_path / "out", "--dtype", dtype).code == 0
    assert seen == [getattr(torch, dtype)]
    model, _ = load_run(tiny_run, dtype=seen[0])
    assert torch.equal(labels_in(tmp_path / "out/noise.png"), expected(model, read_image(picture), **SIDES).labels[0])


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
