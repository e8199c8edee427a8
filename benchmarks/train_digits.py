"""``python -m benchmarks.train_digits [--base RUN] [--runs FOLDER] [--out FILE.jsonl]``: does continual learning cost?

DecoupleCSS learns the digits task after task; one adapter fine-tuned from task to task forgets; all classes at once, in
joint training of the same model, is what there is to reach. Every run is a folder that a killed one goes on from. Exit
code 1: on some setting DecoupleCSS is over 3 points of mIoU below joint training, or forgets over 1 point.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastcss._files import whole_file
from fastcss.models.continual import begin, train
from fastcss.models.continual_plan import DEFAULTS, Plan
from fastcss.models.decouplecss_folder import read_metrics

from . import harness

SETTINGS, SEEDS = ("2-2", "5-1"), (0, 1, 2)
BELOW_JOINT, FORGETTING = 0.03, 0.01
BASE = Path(__file__).parents[1] / "fastcss" / "assets" / "digits"
#: Columns of the table: of a run's summary, and what it is called.
COLUMNS = {"all": "mIoU", "first": "first task", "later": "later tasks", "avg_iou": "Avg-IoU", "ff_iou": "FF-IoU"}


class Case(NamedTuple):
    """One run. Joint training is the same whatever the setting."""

    method: str
    setting: str
    seed: int

    @property
    def folder(self) -> str:
        return f"joint-{self.seed}" if self.method == "joint" else f"{self.method}-{self.setting}-{self.seed}"


def cases(settings: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """The longest first, so that no process is left alone with one at the end."""
    continual = [Case(m, setting, seed) for seed in seeds for setting in settings for m in ("decouplecss", "naive")]
    return continual + [Case("joint", settings[0], seed) for seed in seeds]


def learn(case: Case, runs: Path, base: Path, plan: dict) -> dict:
    """One run to its end, in a process of its own; → its row."""
    torch.set_num_threads(1)
    defaults = DEFAULTS["digits"].plan
    recipe = dataclasses.replace(defaults["recipe"], **{k: v for k, v in plan.items() if k in ("epochs",)})
    rest = {k: v for k, v in plan.items() if k not in ("epochs",)}
    begin(runs / case.folder, Plan("digits", **case._asdict(), **defaults | rest | {"recipe": recipe}), base)
    train(runs / case.folder)
    return row(runs / case.folder)


def row(run: Path) -> dict:
    """What a finished run's ``metrics.jsonl`` says."""
    records = read_metrics(run)
    tasks = [record for record in records if record["kind"] == "task"]
    (summary,) = (record for record in records if record["kind"] == "summary")
    about = {"benchmark": "train_digits", "run": run.name, **summary, "seconds": sum(of["seconds"] for of in tasks)}
    del about["kind"]
    kept = [{name: of[name] for name in ("task", "classes", "iou", "old", "new", "all", "loss")} for of in tasks]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return about | {"tasks": kept, "torch": torch.__version__, "device_name": harness.device_name("cpu"), "date": now}


def table(rows: Sequence[dict], settings: Sequence[str]) -> list[list[str]]:
    """A line for each setting and method: means over the seeds, and the standard deviation of the mIoU, in points."""
    lines = []
    for setting in settings:
        for method in ("joint", "decouplecss", "naive"):
            of = _of(rows, method, setting)
            cells = [
                f"{100 * statistics.mean(values):.1f}" if None not in (values := [row[name] for row in of]) else "–"
                for name in (COLUMNS if method != "joint" else ["all"])
            ]
            spread = statistics.stdev(row["all"] for row in of) if len(of) > 1 else 0.0
            cells[0] += f" ± {100 * spread:.1f}"
            lines.append([setting, method, *cells, *["–"] * (len(COLUMNS) - len(cells))])
    return lines


def reached(rows: Sequence[dict], settings: Sequence[str]) -> bool:
    """DecoupleCSS is close enough to joint training, and forgets little enough, on every setting."""

    def mean(method: str, setting: str, name: str) -> float:
        return statistics.mean(row[name] for row in _of(rows, method, setting))

    return all(
        mean("joint", setting, "all") - mean("decouplecss", setting, "all") <= BELOW_JOINT
        and mean("decouplecss", setting, "ff_iou") <= FORGETTING
        for setting in settings
    )


def _of(rows: Sequence[dict], method: str, setting: str) -> list[dict]:
    return [row for row in rows if row["method"] == method and (method == "joint" or row["setting"] == setting)]


def show(lines: Sequence[Sequence[str]], console: Console) -> None:
    shown = Table("setting", "method", title="digits: % of IoU on test scenes, mean over the seeds")
    for name in COLUMNS.values():
        shown.add_column(name, justify="right")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_digits", description=__doc__.partition("\n")[2])
    parser.add_argument("--base", type=Path, default=BASE, help="run whose frozen models are taken")
    parser.add_argument("--runs", type=Path, default=Path("out/digits-runs"), help="folder of the runs")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="FIRST-STEP")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--epochs", type=int, help="of every task")
    parser.add_argument("--train-scenes", type=int)
    parser.add_argument("--test-scenes", type=int)
    parser.add_argument("--out", type=Path, help="JSONL file of the rows")
    options = parser.parse_args(arguments)
    names = ("epochs", "train_scenes", "test_scenes")
    plan = {name: value for name in names if (value := getattr(options, name)) is not None}
    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    wanted, rows = cases(options.settings, options.seeds), {}
    workers = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"))
    with workers, Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(wanted))
        pending = {workers.submit(learn, case, options.runs, options.base, plan): case for case in wanted}
        for done in as_completed(pending):
            case = pending[done]
            rows[case] = done.result()
            progress.console.print(f"{case.folder}: mIoU {100 * rows[case]['all']:.1f}")
            progress.advance(bar)
    ordered = [rows[case] for case in wanted]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(options.out) as file:
            file.writelines(json.dumps(of) + "\n" for of in ordered)
    show(table(ordered, options.settings), console)
    return 0 if reached(ordered, options.settings) else 1


if __name__ == "__main__":
    sys.exit(main())
