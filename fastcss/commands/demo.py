"""Runs ``python -m fastcss demo``: finds handwritten digits in photographs, in one pass and task after task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ._arguments import whole
from ._demo_measurement import ROUNDS, WAYS, Figures, find, learned_labels, measure, scenes_of, to_show
from ._tables import counted, learned_in, percent
from .segment import KEPT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

HELP = "find handwritten digits in photographs, in one pass and task after task"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="RUN", type=Path, default=KEPT,
        help="folder of a run that learned the digits, as `train` makes it (default: the one in the package)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="PNG", type=Path, default=Path("out/demo.png"), help="the figure to write (%(default)s)"
    )
    parser.add_argument(
        "--scenes", metavar="N", type=whole(1), default=100, help="how many test scenes are segmented (%(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Segment test scenes in every mode, and write a figure of the results.

    Raises:
        ValueError, IsADirectoryError: the figure's name is no PNG or a folder, or the run has no tasks or other data.
        FileNotFoundError, ModuleNotFoundError: the run does not exist, or a package that the demo needs is missing.
        OSError: the figure cannot be written; an older one is kept.
    """
    import torch
    from rich.console import Console

    from .._files import whole_file
    from ..models.continual import load_run
    from ._demo_figure import draw

    _check(options.out)
    model, plan = load_run(options.model)
    if plan.data != "digits":
        raise ValueError(f"--model: {options.model} has learned {plan.data}, and the demo's scenes are of digits")
    if not model.tasks:
        raise ValueError(f"{options.model} is a run that has learned no task yet")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scenes = scenes_of(plan, options.scenes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(
        f"[bold]{learned_in(len(model.classes), len(model.tasks))}[/bold]; "
        f"looked for in {counted(len(scenes), 'scene')}, in handwriting they were not learned from"
    )
    with _progress(console) as progress:
        figures = measure(model, plan, scenes, progress)
    _print(console, figures, len(scenes))
    shown = [find(model, plan, *item) for item in to_show(scenes, learned_labels(model, plan))]
    with whole_file(options.out, binary=True) as file:
        draw(shown, figures, plan.labels, len(scenes)).savefig(file, format="png", dpi=100)
    console.print(f"→ {options.out}", markup=False, highlight=False)


def _check(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: {out} must end in .png")
    if out.is_dir():
        raise IsADirectoryError(f"--out: {out} is a folder")


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _print(console: Console, figures: Figures, scenes: int) -> None:
    import torch
    from rich.table import Table

    where = "on a GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    learned = Table("task", "classes", title="learned")
    learned.add_column("mIoU in %", justify="right")
    for t, task in enumerate(figures.tasks, 1):
        learned.add_row(str(t), ", ".join(task.classes), percent(task.iou))
    learned.add_row("all", "with the background", percent(figures.miou["one_pass"]))
    console.print(learned)
    table = Table(f"{len(figures.tasks)} tasks, {where}", title="one picture at a time")
    for column in ("ms", f"of {ROUNDS} rounds", "÷ one pass", "mIoU in %"):
        table.add_column(column, justify="right")
    for mode, name in WAYS.items():
        median, least, most = (1000 * seconds for seconds in figures.times[mode])
        ratio = figures.times[mode].median / figures.times["one_pass"].median
        table.add_row(name, f"{median:.1f}", f"{least:.1f}…{most:.1f}", f"{ratio:.2f}", percent(figures.miou[mode]))
    console.print(table)
    equal = f"{100 * figures.equal:.4f}% of the pixels of {counted(scenes, 'scene')}"
    console.print(f"the same label in all three on {equal}")
