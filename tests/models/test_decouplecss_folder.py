"""Tests runs of DecoupleCSS in folders: what is loaded must be what was saved, and nothing incomplete ever be met."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from decouplecss_models import SIZES, add_task, build, pictures
from killed_process import killing
from safetensors.torch import load_file, save_file

from fastcss import _files, one_pass
from fastcss.models import decouplecss_folder, metrics_file
from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import MODES
from fastcss.models.decouplecss_folder import load, save_base, save_task, saved_tasks


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- there and back


def test_what_is_loaded_segments_as_what_was_saved(saved_model, saved):
    state = torch.get_rng_state()
    loaded, given = load(saved), pictures(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.classes == saved_model.classes
    for mode in MODES:
        got, expected = loaded.segment(**given, mode=mode), saved_model.segment(**given, mode=mode)
        assert torch.equal(got.presence, expected.presence)
        for labels, wanted in zip(got.labels, expected.labels, strict=True):
            assert torch.equal(labels, wanted)
            assert len(wanted.unique()) > 2


def test_a_run_saved_again_is_the_same(saved, tmp_path):
    loaded = load(saved)
    save_base(loaded, tmp_path / "again")
    for t in range(3):
        save_task(loaded, t, tmp_path / "again")
    first, second = content(saved), content(tmp_path / "again")
    assert first.keys() == second.keys()  # contents may differ: transformers adds to config.json when it loads
    assert all(second[name] == first[name] for name in first if Path(name).name != "config.json")


def test_only_safetensors_and_json(saved):
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_a_loaded_model_learns_on(run):
    model = load(run)
    add_task(model, 2)
    save_task(model, 3, run)
    assert load(run).classes == model.classes
    assert saved_tasks(run) == 4


def test_one_pass_reads_the_task_folders(saved_model, saved):
    folders = [saved / f"task_{t}" for t in range(3)]
    runner = one_pass.from_directories(ClassDetector.random("tiny"), folders)
    pixels, phrases = pictures(1)["pixel_values"], torch.ones(2, 3, 64)
    with torch.no_grad():
        found = runner(pixels, phrases=phrases).tokens
        for t, task in enumerate(saved_model.tasks):
            saved_model.detector.set_adapter(task.name)
            expected = saved_model.detector(pixels, phrases=phrases).tokens
            torch.testing.assert_close(found[t], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_model_of_another_dtype_stays_so(tmp_path):
    model = build((2,)).bfloat16()
    save_base(model, tmp_path)
    save_task(model, 0, tmp_path)
    loaded = load(tmp_path)
    for part in ("segmenter", "tasks"):
        for got, expected in zip(getattr(loaded, part).parameters(), getattr(model, part).parameters(), strict=True):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, expected)
    got, expected = (m.detector.get_base_model().text_projection.weight for m in (loaded, model))
    assert got.dtype == torch.bfloat16  # torch.equal ignores dtypes
    assert torch.equal(got, expected)


def test_a_run_may_name_the_folders_of_its_base(saved_model, saved, tmp_path):
    run = tmp_path / "run"
    save_base(saved_model, run, detector=saved / "base/detector", segmenter=saved / "base/segmenter")
    assert [path.name for path in run.iterdir()] == ["config.json"]
    for t in range(3):
        save_task(saved_model, t, run)
    (labels,), (expected,) = (m.segment(**pictures(1)).labels for m in (load(run), saved_model))
    assert torch.equal(labels, expected)


def test_half_of_the_base_may_be_elsewhere(saved_model, saved, tmp_path):
    save_base(saved_model, tmp_path, detector=saved / "base/detector")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["segmenter"]
    assert load(tmp_path).classes == ()


# ---- whole or not at all


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("writer", ["save_file", "fsync", "rename"])
def test_a_full_disk_leaves_the_run_as_it_was(saved_model, run, monkeypatch, writer, overwrite):
    t = 1 if overwrite else 2
    if not overwrite:
        shutil.rmtree(run / "task_2")
    before = content(run)
    with monkeypatch.context() as patch:
        patch.setattr(decouplecss_folder if writer == "save_file" else os, writer, full)
        with pytest.raises(OSError, match=rf"No space left on device: '{run}/task_{t}'"):
            save_task(saved_model, t, run, overwrite=overwrite)
    assert content(run) == before
    save_task(saved_model, t, run, overwrite=overwrite)
    assert content(run) == content(run) | before


def test_a_full_disk_begins_no_run(saved_model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_base(saved_model, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path / "run")
    save_base(saved_model, tmp_path / "run")
    assert load(tmp_path / "run").classes == ()


def save_until_killed(model, t: int, folder: Path, calls: int) -> None:
    """Save in a process of its own, which kills itself at the given call of those that touch the disk."""
    dying = killing(calls)

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        whole(tensors, path, metadata)

    whole = dying(save_file)
    decouplecss_folder.save_file = half
    for name in ("mkdir", "fsync", "rename", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    save_task(model, t, folder, overwrite=True)


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_a_killed_save_leaves_the_old_or_the_new(saved_model, saved, tmp_path, there):
    before, run, other = tmp_path / "before", tmp_path / "run", build(SIZES[:3], seed=1)
    save_base(saved_model, before, detector=saved / "base/detector", segmenter=saved / "base/segmenter")
    for t in range(2 + there):
        save_task(saved_model, t, before)
    outcomes, layouts, calls, code = [], set(), 0, None
    while code != 0:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)
        child = multiprocessing.get_context("fork").Process(target=save_until_killed, args=(other, 2, run, calls))
        child.start()
        child.join()
        code, calls = child.exitcode, calls + 1
        assert code in (0, -signal.SIGKILL)
        outcomes.append(generators_of_task_2(run))
        if (layout := frozenset(os.listdir(run))) not in layouts:
            layouts.add(layout)
            assert len(load(run).tasks) == saved_tasks(run)
        save_task(other, 2, run, overwrite=True)
        assert sorted(os.listdir(run)) == ["config.json", "task_0", "task_1", "task_2"]
    old = saved_model.tasks[2].generator.weight_1 if there else None
    new = other.tasks[2].generator.weight_1
    turn = next(i for i, outcome in enumerate(outcomes) if outcome is not None and torch.equal(outcome, new))
    assert 6 < turn < len(outcomes)
    assert all(outcome is None if old is None else torch.equal(outcome, old) for outcome in outcomes[:turn])
    assert all(torch.equal(outcome, new) for outcome in outcomes[turn:])
    assert len(layouts) == (4 if there else 3)


def generators_of_task_2(run: Path) -> torch.Tensor | None:
    if saved_tasks(run) == 2:
        return None
    return load_file(_files.standing_folder(run / "task_2") / "task.safetensors")["generator.weight_1"]


def test_what_is_there_is_not_overwritten_unasked(saved_model, run):
    before = content(run)
    with pytest.raises(FileExistsError, match="task_1 is there already"):
        save_task(saved_model, 1, run)
    with pytest.raises(FileExistsError, match="holds a run already"):
        save_base(saved_model, run)
    assert content(run) == before


def test_the_base_of_something_else_is_not_overwritten(saved_model, run, tmp_path):
    (run / "config.json").unlink()  # what a kill at the end of save_base leaves
    save_base(saved_model, run)
    assert load(run).classes == saved_model.classes
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="base is there already"):
        save_base(saved_model, tmp_path)
    assert (tmp_path / "base" / "notes").read_text() == "mine"


# ---- metrics


def test_metrics_are_read_as_they_were_appended(tmp_path):
    assert metrics_file.read_metrics(tmp_path) == []
    records = [{"task": t, "miou": 0.1 + t} for t in range(3)]
    for record in records:
        metrics_file.append_metrics(tmp_path, record)
    assert metrics_file.read_metrics(tmp_path) == records


@pytest.mark.parametrize("torn", [b"{", b'{"task": 3, "mi', b'{"task": 3}', b"\xc3"])
def test_a_torn_last_line_does_not_count(tmp_path, torn):
    metrics_file.append_metrics(tmp_path, {"task": 0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert metrics_file.read_metrics(tmp_path) == [{"task": 0}]
    metrics_file.append_metrics(tmp_path, {"task": 1})
    assert metrics_file.read_metrics(tmp_path) == [{"task": 0}, {"task": 1}]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"task": 0}\n{"task"\n{"task": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        metrics_file.read_metrics(tmp_path)
