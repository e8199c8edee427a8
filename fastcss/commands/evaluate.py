"""Runs ``python -m fastcss evaluate``: measures what a run's model knows now, beside what it knew while it learned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import whole
from ._tables import percent, summary_line, task_table

if TYPE_CHECKING:
    from ..models.continual_evaluation import Evaluation
    from ..models.continual_plan import Plan
    from ..models.decouplecss import DecoupleCSS

HELP = "measure a run's model on its test pictures, class by class"
EPILOG = """\
examples:
  python -m fastcss evaluate run
  python -m fastcss evaluate run --sequential
      also with the adapters switched one by one: both times, and whether the labels are the same
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder that train made")
    parser.add_argument("--sequential", action="store_true", help="also switch the adapters one by one, and compare")
    parser.add_argument("--root", metavar="FOLDER", help="where PASCAL VOC 2012 or ADE20K is, if not where it was")
    parser.add_argument(
        "--test-scenes", type=whole(1), metavar="N", help="of the digits, if not as many as the run has"
    )
    parser.add_argument("--workers", type=whole(0), default=0, metavar="N", help="processes that read pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of tables")


def run(options: argparse.Namespace) -> None:
    import dataclasses

    from ..models.continual import load_run
    from ..models.metrics_file import read_metrics

    model, plan = load_run(options.run_folder)
    given = {"test_scenes": options.test_scenes, "root": options.root}
    plan = dataclasses.replace(plan, **{name: value for name, value in given.items() if value is not None})
    found = _evaluate(model, plan, options)
    result = _result(model, plan, found, read_metrics(options.run_folder))
    if options.json:
        print(json.dumps({"run": str(options.run_folder)} | result))
    else:
        _print(result, str(options.run_folder))


def _evaluate(model: DecoupleCSS, plan: Plan, options: argparse.Namespace) -> Evaluation:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..data import Overlapped
    from ..models.continual_evaluation import compare

    learned = [label for labels in plan.tasks[: len(model.tasks)] for label in labels]
    test = Overlapped(plan.test_data(), learned)
    modes = ("one_pass", "shared") if options.sequential else ("one_pass",)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("pictures", total=len(test))
        return compare(
            model, test, plan.labels, plan.shortest, plan.longest, modes=modes,
            workers=options.workers, report=lambda count: progress.advance(bar, count),
        )  # fmt: skip


def _result(model: DecoupleCSS, plan: Plan, found: Evaluation, records: list[dict]) -> dict:
    """Return the whole result, ready for JSON."""
    from ..data import ContinualMetrics

    tasks = plan.tasks[: len(model.tasks)]
    metrics = ContinualMetrics(plan.tasks, [1] * len(plan.tasks))
    for _ in tasks:  # the last row covers all tasks
        now = metrics.add(found.iou["one_pass"])
    learned = [0, *(label for labels in tasks for label in labels)]
    result = {
        "data": plan.data,
        "setting": plan.setting,
        "method": plan.method,
        "tasks": [record for record in records if record.get("kind") == "task"],
        "summary": next((record for record in records if record.get("kind") == "summary"), None),
        "now": {name: now[name] for name in ("task", "old", "new", "all")} | {"classes": plan.classes(len(tasks) - 1)},
        "iou": {plan.labels[label]: now["iou"][label] for label in learned},
    }
    if len(found.seconds) > 1:
        result |= {"seconds": found.seconds, "equal": found.equal}
    return result


def _print(result: dict, run: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tasks, now = result["tasks"], result["now"]
    about = f"{run}: {result['method']}, {result['data']} {result['setting']}"
    console.print(task_table([*tasks, now | {"name": "now"}], f"{about}, mIoU in %"))
    if result["summary"]:
        console.print(summary_line(result["summary"]))
    table = Table("class", title="IoU of each class, in %")
    for column in ("task", "when learned", "after the last task", "now"):
        table.add_column(column, justify="right")
    names = list(result["iou"])
    task_of = {name: record for record in tasks for name in record["classes"]} | {names[0]: tasks[0]} if tasks else {}
    for label, (name, value) in enumerate(result["iou"].items()):  # tasks learn the labels in order
        record = task_of.get(name)
        before = [percent(of["iou"][label]) for of in (record, tasks[-1])] if record else ["–", "–"]
        number = str(record["task"]) if record and label else "–"
        table.add_row(name, number, *before, percent(value))
    console.print(table)
    if "seconds" in result:
        one_pass, switched = result["seconds"]["one_pass"], result["seconds"]["shared"]
        console.print(
            f"one pass {one_pass:.2f} s, adapters switched {switched:.2f} s ({switched / one_pass:.2f} times as long); "
            f"the same label on {100 * result['equal']:.4f}% of the pixels"
        )
