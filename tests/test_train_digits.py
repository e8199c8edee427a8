"""Tests the table of the digits: which runs it has, what their rows say, and when it is good enough."""

import dataclasses
import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("torchmetrics")

from benchmarks import train_digits
from fastcss.models.continual_plan import DEFAULTS


def rows(joint: float, ours: float, forgotten: float) -> list[dict]:
    def row(method: str, seed: int, score: float) -> dict:
        rest = {"first": score, "later": score - 0.1, "avg_iou": score + 0.1, "ff_iou": forgotten}
        about = {"method": method, "form": "ours", "setting": "2-2", "seed": seed}
        return about | {"all": score + 0.02 * (seed - 0.5)} | rest

    scores = {"joint": joint, "decouplecss": ours, "naive": 0.1}
    return [row(method, seed, score) for method, score in scores.items() for seed in (0, 1)]


def test_every_run_is_there_once():
    cases = train_digits.cases(("2-2", "5-1"), (0, 1, 2))
    assert len(cases) == len({case.folder for case in cases}) == 3 * 2 * 3 + 3
    everything = train_digits.chosen([case.kind for case in cases] + ["ablations"], ("2-2", "5-1"), (0, 1, 2))
    assert everything == cases + train_digits.ablations(("2-2", "5-1"), 0)
    assert len({case.folder for case in everything}) == 3 * 2 * 3 + 3 + 10 * 2


def test_runs_are_chosen_by_name():
    def names(*given: str) -> list[str]:
        return [case.folder for case in train_digits.chosen(given, ("2-2", "5-1"), (0, 1))]

    assert names("paper") == ["paper-2-2-0", "paper-5-1-0", "paper-2-2-1", "paper-5-1-1"]
    assert names("naive-5-1-1", "joint-0", "no-token-loss") == [
        "naive-5-1-1", "joint-0", "no-token-loss-2-2-0", "no-token-loss-5-1-0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--cases has no paper-2-2-7, ours: there are ablations, paper, decouplecss"):
        names("paper-2-2-7", "ours", "naive")


def test_an_addition_left_out_is_all_that_differs():
    """Each ablation must leave out one addition of the package's way with the digits; the paper's form has none."""
    ours, settings = DEFAULTS["digits"].plan["recipe"], DEFAULTS["digits"].settings
    for name, (recipe, changed, generator) in train_digits.ABLATIONS.items():
        assert all(getattr(ours, field) != value for field, value in recipe.items()), name
        assert all(settings.get(field) != value for field, value in changed.items()), name
        assert recipe or changed or not generator, name
    paper, voc = train_digits.FORMS["paper"], DEFAULTS["voc"]
    assert dataclasses.replace(ours, **paper.recipe) == dataclasses.replace(voc.plan["recipe"], asymmetric_clip=0.0)
    own = settings | paper.settings
    assert {name: own[name] for name in ("prompts", "hidden", "rank", "alpha", "confidence", "threshold")} == {
        name: voc.settings[name] for name in ("prompts", "hidden", "rank", "alpha", "confidence", "threshold")
    }
    assert not paper.generator


def test_a_file_keeps_the_rows_of_other_runs(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    train_digits.merged([{"run": "a", "form": "ours", "all": 1}, {"run": "b", "form": "paper", "all": 2}], path)
    path.write_text(path.read_text() + '{"run": "old", "all": 3}\n')
    got = train_digits.merged([{"run": "b", "form": "paper", "all": 4}, {"run": "c", "form": "ours", "all": 5}], path)
    assert [(row["run"], row["form"], row["all"]) for row in got] == [
        ("a", "ours", 1), ("b", "paper", 4), ("old", "ours", 3), ("c", "ours", 5),
    ]  # fmt: skip
    assert [json.loads(line) for line in path.read_text().splitlines()] == got


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
    """Every method must run in a process of its own, and a second call only read what is there."""
    arguments = ["--runs", tmp_path / "runs", "--out", tmp_path / "rows", "--settings", "5-5", "--seeds", "0"]
    arguments += ["--epochs", "1", "--train-scenes", "8", "--test-scenes", "2"]
    arguments = [str(argument) for argument in (*arguments, "--cases", "paper", "decouplecss-5-5-0", "naive", "joint")]
    first = train_digits.main(arguments)
    assert first in (0, 1)
    written = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    names = ["paper-5-5-0", "decouplecss-5-5-0", "naive-5-5-0", "joint-0"]
    written.sort(key=lambda row: names.index(row["run"]))  # as they were finished
    assert [row["run"] for row in written] == names
    assert [len(row["tasks"]) for row in written] == [2, 2, 2, 1]
    assert [row["form"] for row in written] == ["paper", "ours", "ours", "ours"]
    paper, ours, *_ = written
    sizes = {"confidence": "sam", "hidden": 1024, "rank": 32, "alpha": 32, "sites": "fusion"}
    assert paper["settings"] == ours["settings"] | sizes
    rates = {"batch_size": 24, "learning_rate": 1e-4}  # the epochs are the command's
    assert paper["recipe"] == ours["recipe"] | {"clip": None, "token_weight": 0} | rates
    assert not (tmp_path / "runs" / "paper-5-5-0" / "base").exists()  # nor an initial generator
    losses = [[task["loss"]["tokens"] for task in row["tasks"]] for row in (paper, ours)]
    assert [any(of) for of in losses] == [False, True]
    assert all(0 <= row["all"] <= 1 for row in written)
    assert train_digits.main([*arguments, "--jobs", "1"]) == first
    reread = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    reread.sort(key=lambda row: names.index(row["run"]))
    assert [row | {"date": None} for row in reread] == [row | {"date": None} for row in written]
