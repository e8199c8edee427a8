"""Tests ``evaluate``: the figures of a run, as tables and as JSON, and runs that have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from continual_runs import lines

from fastcss.data import CLASS_NAMES


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_json_is_what_the_run_measured(command, digit_run):
    finished = command("evaluate", digit_run, "--json")
    assert finished.code == 0
    got = json.loads(finished.out)
    *tasks, summary = lines(digit_run)
    assert {name: got[name] for name in ("run", "data", "setting", "method")} == {
        "run": str(digit_run), "data": "digits", "setting": "5-5", "method": "decouplecss",
    }  # fmt: skip
    assert [{name: of[name] for name in task} for of, task in zip(got["tasks"], tasks, strict=True)] == tasks
    assert got["summary"] == summary
    assert list(got["iou"]) == list(CLASS_NAMES["digits"])
    assert list(got["iou"].values()) == tasks[-1]["iou"]
    assert all(got["now"][name] == tasks[-1][name] for name in ("task", "old", "new", "all", "classes"))
    assert "seconds" not in got


def test_tables_a_person_can_read(command, digit_run):
    finished = command("evaluate", digit_run)
    assert finished.code == 0
    first, last, _ = lines(digit_run)
    rows = [cells(line) for line in finished.out.splitlines() if line.startswith("│")]
    percent = [f"{100 * last[name]:.1f}" for name in ("old", "new", "all")]
    assert rows[0][2:] == ["–", *(f"{100 * first[name]:.1f}" for name in ("new", "all"))]
    assert rows[1] == ["2", "five, six, seven, eight, nine", *percent]
    assert rows[2] == ["now", "five, six, seven, eight, nine", *percent]
    by_class = {row[0]: row[1:] for row in rows[3:]}
    assert list(by_class) == list(CLASS_NAMES["digits"])

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    for label, name in enumerate(CLASS_NAMES["digits"]):
        task = first if label <= 5 else last
        number = str(task["task"]) if label else "–"
        assert by_class[name] == [number, *(shown(of["iou"][label]) for of in (task, last, last))]


def test_sequential_is_beside_it(command, digit_run):
    got = json.loads(command("evaluate", digit_run, "--sequential", "--json").out)
    assert got["equal"] >= 0.9999
    assert min(got["seconds"]["one_pass"], got["seconds"]["shared"]) > 0
    out = " ".join(command("evaluate", digit_run, "--sequential").out.split())
    assert "the same label on 100.0000% of the pixels" in out
    assert "adapters switched" in out


def test_other_test_scenes(command, digit_run):
    few, same = (json.loads(command("evaluate", digit_run, "--json", "--test-scenes", count).out) for count in (2, 4))
    assert few["iou"] != same["iou"]
    assert few["tasks"] == same["tasks"]


def test_a_run_that_is_not_finished(command, digit_run, tmp_path):
    run = Path(shutil.copytree(digit_run, tmp_path / "run"))
    shutil.rmtree(run / "task_1")
    (run / "metrics.jsonl").unlink()
    got = json.loads(command("evaluate", run, "--json").out)
    assert list(got["iou"]) == list(CLASS_NAMES["digits"][:6])
    assert list(got["iou"].values()) == lines(digit_run)[0]["iou"][:6]
    assert (got["tasks"], got["summary"], got["now"]["old"]) == ([], None, None)
    out = command("evaluate", run).out
    assert [cells(line)[1] for line in out.splitlines() if line.startswith("│")][1:] == ["–"] * 6


def test_what_cannot_be_evaluated_is_named(command, digit_run, digit_models, tmp_path):
    shutil.copytree(digit_run, tmp_path / "run", ignore=shutil.ignore_patterns("task_*"))
    (tmp_path / "other").mkdir()
    for arguments, message in (
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "other",), "is no run: it has no config.json"),
        ((digit_models,), "is a run without a plan"),
        ((tmp_path / "run",), "has no task yet"),
        ((digit_run, "--root", tmp_path), "root must be None for digits"),
        ((digit_run, "--test-scenes", "0"), "must be a whole number from 1, got '0'"),
    ):
        finished = command("evaluate", *arguments)
        assert (finished.code, finished.out) == (2, "")
        assert message in " ".join(finished.err.split())


@pytest.mark.parametrize("option", ["--sequential", "--json", "--test-scenes"])
def test_help_tells_its_options(command, option):
    assert option in command("evaluate", "--help").out
