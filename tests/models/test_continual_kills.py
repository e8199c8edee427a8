"""Tests runs that are stopped or killed anywhere: resumed, they must equal the unbroken run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from continual_runs import SETTINGS, StopAt, learned, lines, plan_of
from killed_process import killing
from safetensors.torch import load_file, save_file

from fastcss.models import continual_progress
from fastcss.models.continual import begin, train
from fastcss.models.decouplecss_folder import saved_tasks


@pytest.fixture
def run(digit_models, tmp_path) -> Path:
    begin(tmp_path / "run", plan_of(), digit_models, settings=SETTINGS)
    return tmp_path / "run"


def assert_unbroken(run: Path, unbroken: Path) -> None:
    assert learned(run) == learned(unbroken)
    assert lines(run) == lines(unbroken)
    assert sorted(os.listdir(run)) == sorted(os.listdir(unbroken))


def test_stopped_at_every_turn(digit_models, digit_run, tmp_path):
    """Each start is stopped at the next event: in a batch, after an epoch, before, in and after evaluation."""
    run, held = tmp_path / "run", []
    begin(run, plan_of(method="naive"), digit_models, settings=SETTINGS)
    stops = ["learning", "step", "epoch", "step", "epoch", "evaluating", "evaluated", "measured"]
    stops += ["epoch", "epoch", "measured"]
    for event in stops:
        with pytest.raises(KeyboardInterrupt):
            train(run, watch=StopAt(event))
        held.append((saved_tasks(run), len(lines(run)) if (run / "metrics.jsonl").exists() else 0))
    assert held == [*[(0, 0)] * 5, *[(1, 0)] * 2, *[(1, 1)] * 3, (2, 2)]
    train(run)
    assert_unbroken(run, digit_run("naive"))


def train_until_killed(run: Path, calls: int) -> None:
    """Train in a process of its own, which kills itself at the given call of those that make files last."""
    dying = killing(calls)
    for module, name in ((os, "rename"), (os, "rmdir"), (os, "fsync")):
        setattr(module, name, dying(getattr(module, name)))
    train(run)


def test_killed_again_and_again(run, digit_run):
    code, kills = None, 0
    while code != 0:
        # An epoch takes some seven calls to save, a task another seven: with so many, each start gets a little further.
        target, calls = multiprocessing.get_context("fork"), 11 + kills % 5
        child = target.Process(target=train_until_killed, args=(run, calls))
        child.start()
        child.join()
        code, kills = child.exitcode, kills + 1
        assert code in (0, -signal.SIGKILL)
        assert kills < 30
    assert kills > 3
    assert_unbroken(run, digit_run("decouplecss"))


def test_what_a_kill_leaves_half_written_does_not_count(run, digit_run):
    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("epoch"))
    shutil.copytree(run / "progress", run / ".progress.new")
    (run / ".progress.new" / "trainer.safetensors").write_bytes(b"half")
    (run / "metrics.jsonl").write_bytes(b'{"kind": "ta')
    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("epoch"))
    (run / "progress").rename(run / ".progress.old")  # the moment between the old and the new
    train(run)
    assert_unbroken(run, digit_run("decouplecss"))


def test_a_full_disk_keeps_what_was_finished(run, digit_run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("epoch"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(continual_progress, "save_file", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*progress'"):
            train(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train(run)
    assert_unbroken(run, digit_run("decouplecss"))


def test_progress_that_is_not_whole_is_named(run):
    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("epoch"))
    tensors = load_file(run / "progress/task.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: tensors[first][:1].clone()}, run / "progress/task.safetensors")
    with pytest.raises(ValueError, match=rf"task.safetensors is of another architecture: {first} is \[1, "):
        train(run)
    (run / "progress/task.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"task.safetensors is no whole safetensors file"):
        train(run)
    (run / "progress/progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress.json is no JSON"):
        train(run)
