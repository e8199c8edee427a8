"""Tests ``train``: what it makes of its options, what it shows, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from continual_runs import SMALL_DIGITS, lines

from fastcss.commands import train
from fastcss.data import SETTINGS
from fastcss.models.continual import read_plan
from fastcss.models.continual_plan import DEFAULTS
from fastcss.models.decouplecss_folder import read_settings


def test_the_plan_is_the_options_and_the_rest_the_defaults(digit_run):
    plan, defaults = read_plan(digit_run), DEFAULTS["digits"]
    assert (plan.data, plan.setting, plan.method, plan.seed) == ("digits", "5-5", "decouplecss", 0)
    assert (plan.recipe.epochs, plan.recipe.batch_size) == (3, 4)
    assert plan.recipe.learning_rate == defaults.plan["recipe"].learning_rate
    assert (plan.train_scenes, plan.test_scenes) == (12, 4)
    assert (plan.shortest, plan.longest) == (defaults.plan["shortest"], defaults.plan["longest"])
    assert read_settings(digit_run) == defaults.settings | {"sites": "swin+fusion"}


def test_what_it_shows(command, digit_run):
    finished = command("train", "--out", digit_run)
    assert (finished.code, finished.err) == (0, "")
    last, summary = lines(digit_run)[-2:]
    rows = [line for line in finished.out.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    cells = [cell.strip() for cell in rows[1].split("│")[1:-1]]
    assert cells == [
        "2", "five, six, seven, eight, nine", *(f"{100 * last[name]:.1f}" for name in ("old", "new", "all")),
    ]  # fmt: skip
    assert f"Last-IoU {100 * summary['last_iou']:.1f}" in finished.out


def test_help_names_every_setting(command):
    out = command("train", "--help").out
    for data, settings in SETTINGS.items():
        assert f"{data:7} {', '.join(settings)}" in out


def test_other_methods_ranks_rates_seeds_and_phrases(command, digit_models, tmp_path):
    phrases = {
        name: [f"small {name}"]
        for name in (["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    }
    (tmp_path / "phrases.json").write_text(json.dumps(phrases))
    run, given = tmp_path / "run", (*SMALL_DIGITS, "--base", digit_models, "--phrases", tmp_path / "phrases.json")
    given += ("--method", "joint", "--rank", "3", "--learning-rate", "1e-3", "--seed", "4", "--sites", "fusion")
    assert command("train", *given, "--epochs", "1", "--workers", "1", "--out", run).code == 0
    plan = read_plan(run)
    assert (plan.method, plan.recipe.learning_rate, plan.seed, plan.phrases) == ("joint", 1e-3, 4, phrases)
    assert {name: read_settings(run)[name] for name in ("rank", "alpha", "sites")} == {
        "rank": 3, "alpha": 3, "sites": "fusion",
    }  # fmt: skip
    assert len(lines(run)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setting", "2-2"), "was begun with setting '5-5', and is to go on with '2-2'"),
        (("--data", "voc"), "was begun with data 'digits', and is to go on with 'voc'"),
        (("--method", "naive"), "was begun with method 'decouplecss', and is to go on with 'naive'"),
        (("--epochs", "9"), "was begun with epochs 3, and is to go on with 9"),
        (("--rank", "2"), "was begun with rank 8, and is to go on with 2"),
        (("--sites", "fusion"), "was begun with sites 'swin+fusion', and is to go on with 'fusion'"),
        (("--seed", "1"), "was begun with seed 0, and is to go on with 1"),
    ],
)
def test_another_plan_is_refused(command, digit_run, arguments, message):
    finished = command("train", "--out", digit_run, *arguments)
    assert (finished.code, finished.out) == (2, "")
    assert finished.err == f"python -m fastcss train: error: {digit_run} {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is needed: there is no run in"),
        (("--data", "digits"), "--setting is needed"),
        (("--data", "coco", "--setting", "2-2"), "--data must be one of digits, voc, ade, got 'coco'"),
        (("--data", "digits", "--setting", "3-3"), "setting '3-3' does not divide 10 classes"),
        (("--data", "digits", "--setting", "two"), "setting must be like 15-5"),
        (
            ("--data", "digits", "--setting", "2-2", "--method", "ewc"),
            "method must be one of decouplecss, naive, joint",
        ),
        (("--data", "digits", "--setting", "2-2", "--root", "."), "root must be None for digits"),
        (("--data", "digits", "--setting", "2-2", "--base", "nowhere"), "no such folder: nowhere"),
        (("--data", "digits", "--setting", "2-2", "--base", "a", "--sam", "b"), "give one or the other"),
        (("--data", "digits", "--setting", "2-2", "--sam", "b"), "--detector and --sam are needed, both"),
        (("--data", "digits", "--setting", "2-2", "--phrases", "none.json"), "no such file: none.json"),
        (("--data", "voc", "--setting", "15-5"), "--root is needed: the folder of voc"),
        (("--data", "voc", "--setting", "15-5", "--root", "nowhere"), "no pictures of VOC 2012 at nowhere"),
        (("--data", "ade", "--setting", "100-50", "--root", "nowhere"), "--detector and --sam are needed"),
        (("--data", "ade", "--setting", "100-50", "--root", "nowhere", "--base", "a"), "no pictures and label maps at"),
        (
            ("--data", "digits", "--setting", "2-2", "--voc-list", "train"),
            "--voc-list is of VOC's pictures, and --data",
        ),
        (("--epochs", "0"), "must be a whole number from 1, got '0'"),
        (("--learning-rate", "nan"), "must be a number above 0, got 'nan'"),
        (("--workers", "-1"), "got '-1'"),
    ],
)
def test_what_cannot_be_begun_is_told(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    finished = command("train", "--out", "run", *arguments)
    assert (finished.code, finished.out) == (2, "")
    assert message in " ".join(finished.err.split())
    assert os.listdir(tmp_path) == []


def test_an_installation_without_the_kept_models_says_so(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "KEPT", tmp_path / "assets")
    finished = command("train", *SMALL_DIGITS, "--out", tmp_path / "run")
    assert finished.code == 2
    assert "this installation has no models for the digits" in finished.err


def test_a_damaged_run_is_named(command, digit_run, tmp_path):
    run = Path(shutil.copytree(digit_run, tmp_path / "run"))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    shutil.rmtree(run / "task_0")
    finished = command("train", "--out", run)
    assert finished.code == 2
    assert f"{run}/task_0 is missing; there is task_1" in finished.err
