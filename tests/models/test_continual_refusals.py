"""Tests runs that must not begin, must not go on, or have nothing left to do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import shutil

import pytest
from continual_runs import RECIPE, SETTINGS, StopAt, plan_of

from fastcss.models.continual import begin, load_run, train
from fastcss.models.continual_watch import Watch


def test_a_finished_run_is_left_as_it_is(digit_run, digit_models):
    run = digit_run("decouplecss")
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    events = [name for name in vars(Watch) if not name.startswith("_")]
    begin(run, plan_of(), digit_models, settings=SETTINGS)
    for event in events:
        assert train(run, watch=StopAt(event)) == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"setting": "2-2"}, {}, "was begun with setting '5-5', and is to go on with '2-2'"),
        ({"method": "naive"}, {}, "with method 'decouplecss', and is to go on with 'naive'"),
        ({"recipe": dataclasses.replace(RECIPE, epochs=3)}, {}, "with epochs 2, and is to go on with 3"),
        ({}, {"rank": 4}, "with rank 2, and is to go on with 4"),
    ],
)
def test_another_plan_is_refused(digit_run, digit_models, fields, settings, message):
    with pytest.raises(ValueError, match=message):
        begin(digit_run("decouplecss"), plan_of(**fields), digit_models, settings=SETTINGS | settings)


def test_nothing_is_begun_without_data_or_models(digit_models, tmp_path):
    run = tmp_path / "run"
    voc = {"data": "voc", "setting": "15-5", "root": str(tmp_path / "voc"), "train_scenes": None, "test_scenes": None}
    with pytest.raises(FileNotFoundError, match="VOC: no pictures of VOC 2012"):
        begin(run, plan_of(**voc), digit_models)
    with pytest.raises(ValueError, match="no training picture shows any class of task 1: zero"):
        begin(run, plan_of(setting="1-1", train_scenes=1, seed=1), digit_models)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        begin(run, plan_of(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*sam"):
        begin(run, plan_of(), (digit_models / "base/detector", tmp_path / "sam"))
    with pytest.raises(ValueError, match="threshold must be above 0"):
        begin(run, plan_of(), digit_models, settings={"threshold": 0})
    words = digit_models / "base/detector/tokenizer.json"
    shutil.copytree(digit_models, tmp_path / "base")
    (tmp_path / "base/base/detector" / words.name).unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        begin(run, plan_of(), tmp_path / "base")
    assert not run.exists()


def test_no_run_no_plan_and_no_sense_are_named(digit_models, digit_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a run without a plan"):
        train(digit_models)
    run = tmp_path / "run"
    shutil.copytree(digit_run("decouplecss"), run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"run has 2 tasks, and its metrics\.jsonl 0"):
        train(run)
    config = json.loads((run / "config.json").read_text())
    config["training"]["setting"] = "3-3"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: tasks: setting '3-3' does not divide 10"):
        load_run(run)


def train_and_wait(run, begun, enough) -> None:
    class Waiting(Watch):
        def learning(self, *_):
            begun.set()
            enough.wait(60)
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(run, watch=Waiting())


def test_two_do_not_train_one_run(digit_models, tmp_path):
    run, fork = tmp_path / "run", multiprocessing.get_context("fork")
    begin(run, plan_of(), digit_models, settings=SETTINGS)
    begun, enough = fork.Event(), fork.Event()
    other = fork.Process(target=train_and_wait, args=(run, begun, enough))
    other.start()
    assert begun.wait(60)
    with pytest.raises(BlockingIOError, match="another process is training this run"):
        train(run)
    enough.set()
    other.join()
    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("learning"))
