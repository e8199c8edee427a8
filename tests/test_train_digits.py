"""The table of the digits: which runs, what their rows say, and when it is good enough."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("peft")
pytest.importorskip("torchmetrics")

from benchmarks import train_digits


def rows(joint: float, ours: float, forgotten: float) -> list[dict]:
    def row(method: str, seed: int, score: float) -> dict:
        rest = {"first": score, "later": score - 0.1, "avg_iou": score + 0.1, "ff_iou": forgotten}
        return {"method": method, "setting": "2-2", "seed": seed, "all": score + 0.02 * (seed - 0.5)} | rest

    scores = {"joint": joint, "decouplecss": ours, "naive": 0.1}
    return [row(method, seed, score) for method, score in scores.items() for seed in (0, 1)]


def test_every_run_is_there_once():
    cases = train_digits.cases(("2-2", "5-1"), (0, 1, 2))
    assert len(cases) == len({case.folder for case in cases}) == 2 * 2 * 3 + 3


def test_the_table_has_means_over_the_seeds():
    table = train_digits.table(rows(0.5, 0.49, 0.005), ("2-2",))
    assert table == [
        ["2-2", "joint", "50.0 ± 1.4", "–", "–", "–", "–"],
        ["2-2", "decouplecss", "49.0 ± 1.4", "49.0", "39.0", "59.0", "0.5"],
        ["2-2", "naive", "10.0 ± 1.4", "10.0", "0.0", "20.0", "0.5"],
    ]


@pytest.mark.parametrize(
    ("joint", "ours", "forgotten", "good"),
    [(0.5, 0.48, 0.005, True), (0.5, 0.46, 0.005, False), (0.5, 0.5, 0.02, False), (0.4, 0.5, -0.1, True)],
)
def test_what_is_good_enough(joint, ours, forgotten, good):
    assert train_digits.reached(rows(joint, ours, forgotten), ("2-2",)) == good


def test_runs_from_the_kept_models(tmp_path):
    """Every method, in processes of their own; a second call only reads what is there."""
    command = [sys.executable, "-m", "benchmarks.train_digits", "--runs", tmp_path / "runs", "--out", tmp_path / "rows"]
    command += ["--settings", "5-5", "--seeds", "0", "--epochs", "1", "--train-scenes", "8", "--test-scenes", "2"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode in (0, 1), first.stderr
    written = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["run"] for row in written] == ["decouplecss-5-5-0", "naive-5-5-0", "joint-0"]
    assert [len(row["tasks"]) for row in written] == [2, 2, 1]
    assert all(0 <= row["all"] <= 1 for row in written)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == first.returncode
    reread = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row | {"date": None} for row in reread] == [row | {"date": None} for row in written]
