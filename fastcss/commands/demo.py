"""``python -m fastcss demo``: handwritten digits in photographs, found in one pass and task after task."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ._arguments import whole
from ._tables import counted, percent
from .segment import KEPT, MODES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils.data import Dataset

    from ..data import DigitScenes
    from ..models.continual_evaluation import Evaluation
    from ..models.continual_plan import Plan
    from ..models.decouplecss import DecoupleCSS

HELP = "find handwritten digits in photographs, in one pass and task after task"
#: The modes of ``DecoupleCSS.segment``, for people.
WAYS = dict(zip(MODES, ("one pass", "adapters switched", "everything once a task"), strict=True))
TIMED, ROUNDS = 8, 5  # scenes that are timed, and how often
SHOWN = 4


class Times(NamedTuple):
    """What one picture took, in seconds, over the rounds."""

    median: float
    least: float
    most: float


class Learned(NamedTuple):
    """A task's classes, and their mIoU, None where there is none."""

    classes: list[str]
    iou: float | None


class Figures(NamedTuple):
    """What the demo measures.

    Attributes:
        tasks: in their order.
        iou: of every label of the data set, None where there is none.
        miou: for each mode, of background and all classes.
        equal: share of the pixels to which all modes gave one label.
        times: for each mode.
    """

    tasks: list[Learned]
    iou: list[float | None]
    miou: dict[str, float | None]
    equal: float
    times: dict[str, Times]


class Scene(NamedTuple):
    """float32 ``[3, H, W]`` in 0…1, what is in it and what was found, int64 ``[H, W]`` with the data set's labels."""

    image: Tensor
    labels: Tensor
    found: Tensor


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
    """Segment test scenes in every mode, and write a figure of it.

    Raises:
        ValueError, IsADirectoryError: the figure is to be no PNG, or a folder; a run without tasks, or of other data.
        FileNotFoundError, ModuleNotFoundError: no such run; a package that the demo needs is not installed.
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


def measure(model: DecoupleCSS, plan: Plan, scenes: DigitScenes, progress: Progress) -> Figures:
    """How well each mode segments ``scenes``, and how fast the first of them, picture by picture."""
    from torch.utils.data import Subset

    bar = progress.add_task("segmenting", total=len(scenes))
    found = _compare(model, plan, scenes, 8, lambda count: progress.advance(bar, count))
    few = Subset(scenes, range(min(TIMED, len(scenes))))
    timing = progress.add_task("timing", total=ROUNDS * len(few))
    rounds = [_compare(model, plan, few, 1, lambda count: progress.advance(timing, count)) for _ in range(ROUNDS)]
    times = {}
    for mode in MODES:
        seconds = [of.seconds[mode] / len(few) for of in rounds]
        times[mode] = Times(statistics.median(seconds), min(seconds), max(seconds))
    rows = {mode: _rows(model, plan, found.iou[mode]) for mode in MODES}
    one_pass = rows["one_pass"]
    tasks = [Learned(plan.classes(t), row["new"]) for t, row in enumerate(one_pass)]
    miou = {mode: of[-1]["all"] for mode, of in rows.items()}
    return Figures(tasks, one_pass[-1]["iou"], miou, found.equal, times)


def learned_in(classes: int, tasks: int) -> str:
    name = "class" if classes == 1 else "classes"
    return f"{classes} {name}, learned in {f'{tasks} tasks, one after the other' if tasks > 1 else 'one task'}"


def scenes_of(plan: Plan, count: int) -> DigitScenes:
    """So many of the scenes that a run is evaluated on."""
    import dataclasses

    return dataclasses.replace(plan, test_scenes=count).test_data()


def learned_labels(model: DecoupleCSS, plan: Plan) -> list[int]:
    """The data set's labels of what the model has learned."""
    return [label for labels in plan.tasks[: len(model.tasks)] for label in labels]


def to_show(scenes: DigitScenes, labels: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """A few scenes that together show many of the classes; what the model makes of them plays no part."""
    from ..data import Overlapped

    shows = {i: set(labels).intersection(scenes.digits(i)) for i in range(len(scenes))}
    chosen, seen = [], set()
    while shows and len(chosen) < SHOWN:
        best = max(shows, key=lambda i: (len(shows[i] - seen), len(shows[i])))
        seen |= shows.pop(best)
        chosen.append(best)
    overlapped = Overlapped(scenes, labels)
    return [overlapped[i] for i in chosen]


def find(model: DecoupleCSS, plan: Plan, image: Tensor, labels: Tensor) -> Scene:
    """A scene with what the model finds in one pass."""
    import torch

    from ..models.preprocessing import preprocess

    like = next(model.parameters())
    picture = preprocess(image, model.segmenter.image_size, plan.shortest, plan.longest)
    given = (picture.pixel_values[None].to(like), picture.sam_pixel_values[None].to(like))
    found = model.segment(*given, [picture.size], [picture.crop]).labels[0].cpu()
    return Scene(image, labels, torch.tensor([0, *map(plan.labels.index, model.classes)])[found])


def _check(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: {out} must end in .png")
    if out.is_dir():
        raise IsADirectoryError(f"--out: {out} is a folder")


def _compare(
    model: DecoupleCSS, plan: Plan, scenes: Dataset, batch_size: int, report: Callable[[int], None]
) -> Evaluation:
    from ..data import Overlapped
    from ..models.continual_evaluation import compare

    test = Overlapped(scenes, learned_labels(model, plan))
    sides = (plan.shortest, plan.longest)
    return compare(model, test, plan.labels, *sides, MODES, batch_size=batch_size, report=report)


def _rows(model: DecoupleCSS, plan: Plan, iou: Tensor) -> list[dict]:
    """What ``ContinualMetrics`` makes of it, task by task."""
    from ..data import ContinualMetrics

    metrics = ContinualMetrics(plan.tasks, [1] * len(plan.tasks))
    return [metrics.add(iou) for _ in model.tasks]


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
