"""``python -m benchmarks.train_digits [--cases NAME…] [--runs FOLDER] [--out FILE]``: does continual learning cost?

DecoupleCSS learns the digits task after task; one adapter fine-tuned from task to task forgets; joint training of the
same model on all classes at once is the goal to reach. A further method is the paper's own recipe, without what this
project adds; and --cases can ask for runs that leave out one of these additions each ("ablations"). Every run is a
folder, from which a killed run goes on; its row is in the file as soon as it is finished. Exit code 1: DecoupleCSS is
over 3 points of mIoU below joint training on some setting, or forgets over 1 point.
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
from fastcss.models.continual import begin, read_plan, train
from fastcss.models.continual_plan import DEFAULTS, Plan
from fastcss.models.decouplecss_folder import checkpoint_folders, read_settings
from fastcss.models.metrics_file import read_metrics

from . import harness

SETTINGS, SEEDS = ("2-2", "5-1"), (0, 1, 2)
BELOW_JOINT, FORGETTING = 0.03, 0.01
BASE = Path(__file__).parents[1] / "fastcss" / "assets" / "digits"
#: The columns of the table: a field of a run's summary, and its title.
COLUMNS = {"all": "mIoU", "first": "first task", "later": "later tasks", "avg_iou": "Avg-IoU", "ff_iou": "FF-IoU"}


class Form(NamedTuple):
    """Says in what DecoupleCSS learns differently from the package's own defaults for the digits.

    Attributes:
        recipe: fields of ``Recipe``.
        settings: settings of ``DecoupleCSS``.
        generator: whether new classes' prompt generators begin as copies of the pre-trained one.
    """

    recipe: dict = {}  # noqa: RUF012
    settings: dict = {}  # noqa: RUF012
    generator: bool = True


RATES = {"epochs": 5, "batch_size": 24, "learning_rate": 1e-4}  # the paper's, for VOC
#: The paper's losses, confidence and generators. Tasks of one class have this project's negatives: the paper has none.
METHOD = Form({"token_weight": 0.0, "clip": None}, {"confidence": "sam", "hidden": 1024}, generator=False)
ADAPTERS = {"rank": 32, "alpha": 32, "sites": "fusion"}
OURS, PAPER = "ours", "paper"
FORMS = {
    OURS: Form(),
    PAPER: Form(METHOD.recipe | RATES, METHOD.settings | ADAPTERS, generator=False),
}
#: Each ablation leaves out one thing that the package does for the digits and the paper does not mention; the last has
#: all of the paper's method and adapters at this package's rates.
ABLATIONS = {
    "no-token-loss": Form({"token_weight": 0.0, "one_class_token_weight": 0.0}),
    "confidence-sam": Form(settings={"confidence": "sam"}),
    "random-generator": Form(generator=False),
    "random-generator-1024": Form(settings={"hidden": 1024}, generator=False),
    "no-gradient-clip": Form({"clip": None}),
    "asymmetric-clip": Form({"asymmetric_clip": 0.05}),  # Ridnik et al.'s, which eq. A.3 leaves out
    "rank-32": Form(settings={"rank": 32, "alpha": 32}),
    "sites-fusion": Form(settings={"sites": "fusion"}),
    "rates-of-the-paper": Form(RATES),
    "paper-at-our-rates": Form(METHOD.recipe, METHOD.settings | ADAPTERS, generator=False),
}


class Case(NamedTuple):
    """Names one run. Joint training is the same whatever the setting."""

    method: str
    setting: str
    seed: int
    form: str = OURS

    @property
    def kind(self) -> str:
        """The name of a group of runs, by which ``--cases`` may ask for this one, too."""
        return self.method if self.form == OURS else self.form

    @property
    def folder(self) -> str:
        return f"joint-{self.seed}" if self.method == "joint" else f"{self.kind}-{self.setting}-{self.seed}"


def cases(settings: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """List the runs of the table, the longest first, so that no process is left alone with a long one at the end."""
    kinds = (("decouplecss", PAPER), ("decouplecss", OURS), ("naive", OURS))
    continual = [Case(m, setting, seed, form) for m, form in kinds for seed in seeds for setting in settings]
    return continual + [Case("joint", settings[0], seed) for seed in seeds]


def ablations(settings: Sequence[str], seed: int) -> list[Case]:
    return [Case("decouplecss", setting, seed, form) for form in ABLATIONS for setting in settings]


def chosen(names: Sequence[str] | None, settings: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """Return the table's cases, or those named: a run, all runs of a method or form, or "ablations".

    Raises:
        ValueError: a name names nothing.
    """
    table, further = cases(settings, seeds), ablations(settings, seeds[0])
    if names is None:
        return table
    found = [case for case in table + further if {case.folder, case.kind} & {*names}]
    found += further if "ablations" in names else []
    known = {name for case in found for name in (case.folder, case.kind)} | {"ablations"}
    if unknown := [name for name in names if name not in known]:
        kinds = dict.fromkeys(case.kind for case in table + further)
        raise ValueError(f"--cases has no {', '.join(unknown)}: there are ablations, {', '.join(kinds)}, and each run")
    return list(dict.fromkeys(found))


def learn(case: Case, runs: Path, base: Path, plan: dict) -> dict:
    """Train one run to its end, in a process of its own, and return its row."""
    torch.set_num_threads(1)
    defaults, form = DEFAULTS["digits"].plan, (FORMS | ABLATIONS)[case.form]
    epochs = {name: value for name, value in plan.items() if name == "epochs"}
    recipe = dataclasses.replace(defaults["recipe"], **form.recipe | epochs)
    rest = {name: value for name, value in plan.items() if name != "epochs"}
    about = Plan("digits", case.setting, method=case.method, seed=case.seed, **defaults | rest | {"recipe": recipe})
    if form.generator:
        begin(runs / case.folder, about, base, settings=form.settings)
    else:  # given the folders of the frozen models alone, the run needs to be told what the base's own settings say
        places = checkpoint_folders(base)
        sites = {"sites": read_settings(base)["sites"]}
        begin(runs / case.folder, about, (places["detector"], places["segmenter"]), settings=sites | form.settings)
    train(runs / case.folder)
    return row(runs / case.folder, case.form)


def row(run: Path, form: str) -> dict:
    """Make a row of what a finished run's ``metrics.jsonl`` says and what it was trained with."""
    records = read_metrics(run)
    tasks = [record for record in records if record["kind"] == "task"]
    (summary,) = (record for record in records if record["kind"] == "summary")
    about = {"benchmark": "train_digits", "run": run.name, "form": form, **summary}
    about |= {"seconds": sum(of["seconds"] for of in tasks)}
    about |= {"recipe": dataclasses.asdict(read_plan(run).recipe), "settings": read_settings(run)}
    del about["kind"]
    kept = [{name: of[name] for name in ("task", "classes", "iou", "old", "new", "all", "loss")} for of in tasks]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return about | {"tasks": kept, "torch": torch.__version__, "device_name": harness.device_name("cpu"), "date": now}


def table(rows: Sequence[dict], settings: Sequence[str]) -> list[list[str]]:
    """Make a line for each setting and method: means over the seeds and the mIoU's standard deviation, in points."""
    lines = []
    for setting in settings:
        for method in ("joint", "decouplecss", PAPER, "naive", *ABLATIONS):
            of = _of(rows, method, setting)
            if not of:
                continue
            cells = [
                f"{100 * statistics.mean(values):.1f}" if None not in (values := [row[name] for row in of]) else "–"
                for name in (COLUMNS if method != "joint" else ["all"])
            ]
            spread = statistics.stdev(row["all"] for row in of) if len(of) > 1 else 0.0
            cells[0] += f" ± {100 * spread:.1f}"
            lines.append([setting, method, *cells, *["–"] * (len(COLUMNS) - len(cells))])
    return lines


def reached(rows: Sequence[dict], settings: Sequence[str]) -> bool:
    """Tell whether DecoupleCSS is close enough to joint training, and forgets little enough, on every setting that has
    both."""
    settings = [each for each in settings if _of(rows, "joint", each) and _of(rows, "decouplecss", each)]

    def mean(method: str, setting: str, name: str) -> float:
        return statistics.mean(row[name] for row in _of(rows, method, setting))

    return all(
        mean("joint", setting, "all") - mean("decouplecss", setting, "all") <= BELOW_JOINT
        and mean("decouplecss", setting, "ff_iou") <= FORGETTING
        for setting in settings
    )


def _of(rows: Sequence[dict], kind: str, setting: str) -> list[dict]:
    """Select the rows of a method as the package has it, or of another form."""

    def kind_of(row: dict) -> str:
        return row["method"] if row["form"] == OURS else row["form"]

    return [row for row in rows if kind_of(row) == kind and (kind == "joint" or row["setting"] == setting)]


def merged(rows: Sequence[dict], path: Path) -> list[dict]:
    """Put these rows into the file, in the places of their runs or at its end, and return all its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    together = {of["run"]: of for of in ({"form": OURS} | json.loads(line) for line in lines)}
    together |= {of["run"]: of for of in rows}
    with whole_file(path) as file:
        file.writelines(json.dumps(of) + "\n" for of in together.values())
    return list(together.values())


def show(lines: Sequence[Sequence[str]], console: Console) -> None:
    shown = Table("setting", "method", title="digits: % of IoU on test scenes, mean over the seeds")
    for name in COLUMNS.values():
        shown.add_column(name, justify="right")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_digits", description=__doc__.partition("\n")[2])
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME",
        help="runs, methods or forms by name, or 'ablations'; by default decouplecss, naive, joint and paper",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the runs, and do nothing")
    parser.add_argument("--base", type=Path, default=BASE, help="run whose frozen models are taken")
    parser.add_argument("--runs", type=Path, default=Path("out/digits-runs"), help="folder of the runs")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="FIRST-STEP")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--epochs", type=int, help="of every task")
    parser.add_argument("--train-scenes", type=int)
    parser.add_argument("--test-scenes", type=int)
    parser.add_argument("--out", type=Path, help="JSONL file of the rows; those of other runs stay in it")
    options = parser.parse_args(arguments)
    try:
        wanted, rows = chosen(options.cases, options.settings, options.seeds), {}
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(case.folder for case in wanted), sep="\n")
        return 0
    names = ("epochs", "train_scenes", "test_scenes")
    plan = {name: value for name in names if (value := getattr(options, name)) is not None}
    console = Console(width=None if sys.stdout.isatty() else 140)
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    workers = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"))
    with workers, Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(wanted))
        pending = {workers.submit(learn, case, options.runs, options.base, plan): case for case in wanted}
        for done in as_completed(pending):
            case = pending[done]
            rows[case] = done.result()
            progress.console.print(f"{case.folder}: mIoU {100 * rows[case]['all']:.1f}")
            progress.advance(bar)
            ordered = [rows[case] for case in wanted if case in rows]
            if options.out:
                ordered = merged(ordered, options.out)
    show(table(ordered, options.settings), console)
    return 0 if reached(ordered, options.settings) else 1


if __name__ == "__main__":
    sys.exit(main())
