"""Runs ``python -m fastcss train``: learns task after task, and goes on after an interruption."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import CLASS_NAMES, SETTINGS
from ..data.voc import lists
from ..models.continual_watch import Watch
from ._arguments import whole
from ._tables import few, summary_line, task_table
from .segment import KEPT

if TYPE_CHECKING:
    from ..models.decouplecss_training import Losses

#: Continual runs on VOC learn from one of these lists.
VOC_LISTS = ("train_aug", "train")
HELP = "learn a data set's classes task after task; the same command goes on where it was stopped"
EPILOG = """\
settings, as FIRST-STEP classes; any other that divides the classes will do:
{settings}

examples:
  python -m fastcss train --data digits --setting 2-2 --out run
  python -m fastcss train --out run
      goes on with the run
  python -m fastcss train --data voc --setting 15-1 --root VOCdevkit/VOC2012 \\
      --detector grounding-dino-tiny --sam sam-vit-base --out run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG.format(settings="\n".join(f"  {data:7} {', '.join(of)}" for data, of in SETTINGS.items()))
    parser.add_argument(
        "--out", required=True, type=Path, metavar="RUN", help="folder of the run, made or gone on with"
    )
    task = parser.add_argument_group("what is learned")
    task.add_argument("--data", metavar="NAME", help=f"{', '.join(CLASS_NAMES)}")
    task.add_argument("--setting", metavar="FIRST-STEP", help="classes in the first task and in each further one")
    task.add_argument(
        "--method", metavar="NAME",
        help="decouplecss (the default); naive: one adapter, fine-tuned from task to task; joint: all classes at once",
    )  # fmt: skip
    task.add_argument("--root", metavar="FOLDER", help="where PASCAL VOC 2012 or ADE20K is")
    task.add_argument(
        "--voc-list", metavar="NAME", choices=VOC_LISTS,
        help="of VOC's pictures: train_aug (the default, 10,582, as published) or train (1,464)",
    )  # fmt: skip
    task.add_argument("--train-scenes", type=whole(1), metavar="N", help="how many the digits' training has")
    task.add_argument("--test-scenes", type=whole(1), metavar="N", help="and their evaluation")
    models = parser.add_argument_group("what it starts from; a run that is there has it already")
    models.add_argument("--detector", metavar="FOLDER", help="Grounding DINO, as transformers saves it")
    models.add_argument("--sam", metavar="FOLDER", help="SAM, as transformers saves it (see convert-sam)")
    models.add_argument(
        "--base", metavar="RUN",
        help="a run whose frozen models are taken, and its initial prompt generator if it has one; for digits the "
        "package's",
    )  # fmt: skip
    models.add_argument("--phrases", metavar="FILE", help="JSON: {class: [phrases]}, in place of the package's phrases")
    how = parser.add_argument_group("how; the defaults are the paper's, or for digits the package's")
    how.add_argument("--seed", type=whole(0), metavar="N", help="of all that is random (default 0)")
    how.add_argument("--epochs", type=whole(1), metavar="N", help="a task")
    how.add_argument("--batch-size", type=whole(1), metavar="N", help="pictures a step")
    how.add_argument("--learning-rate", type=_rate, metavar="X", help="at the first step of a task")
    how.add_argument("--rank", type=whole(1), metavar="N", help="of the adapters, and their alpha")
    how.add_argument(
        "--sites", metavar="NAME",
        help="where they sit: swin+fusion or convnext+fusion, as the detector's backbone is, or fusion alone "
        "(default: as the base has it, else fusion)",
    )  # fmt: skip
    how.add_argument(
        "--workers", type=whole(0), default=0, metavar="N", help="processes that read pictures (default: none)"
    )


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ..models.continual import train
    from ..models.metrics_file import read_metrics

    plan = _begun(options) if (options.out / "config.json").exists() else _begin(options)
    device = _device()
    console = Console()
    about = f"{options.out}: {plan.method}, {plan.data} {plan.setting}"
    console.print(f"{about}, tasks: {len(plan.tasks)}, on {device}", markup=False)
    for note in _notes(plan):
        console.print(note, markup=False)
    records = [record for record in read_metrics(options.out) if record.get("kind") == "task"]
    bars = _Bars(console, len(plan.tasks), plan.recipe.epochs, records)
    try:
        with bars.progress:
            summary = train(options.out, watch=bars, workers=options.workers, device=device)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last epoch that was finished")
        raise
    console.print(task_table(records, f"{about}, mIoU in %"))
    console.print(summary_line(summary))


def _begun(options: argparse.Namespace):
    """Return the plan of the run that is there; raise ValueError if the options contradict it."""
    from ..models.continual import read_plan
    from ..models.continual_plan import check_same
    from ..models.decouplecss_folder import read_settings

    plan = read_plan(options.out)
    kept = plan.to_json()
    given = _given(options)
    check_same(kept, kept | given | {"recipe": kept["recipe"] | given["recipe"]}, str(options.out))
    settings = read_settings(options.out)
    check_same(settings, settings | _settings(options), str(options.out))
    return plan


def _begin(options: argparse.Namespace):
    """Begin the run, and return its plan."""
    import dataclasses

    from ..models.continual import begin
    from ..models.continual_plan import DEFAULTS, Plan

    for name in ("data", "setting"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is needed: there is no run in {options.out} yet")
    if options.data not in DEFAULTS:
        raise ValueError(f"--data must be one of {', '.join(DEFAULTS)}, got {options.data!r}")
    if options.data != "digits" and options.root is None:
        raise ValueError(f"--root is needed: the folder of {options.data}")
    defaults, given = DEFAULTS[options.data], _given(options)
    if options.data != "voc" and options.voc_list is not None:
        raise ValueError(f"--voc-list is of VOC's pictures, and --data is {options.data}")
    if options.data == "voc" and options.voc_list is None and "train_aug" not in (there := lists(options.root)):
        raise FileNotFoundError(
            "VOC: continual segmentation learns from the 10,582 pictures of train_aug.txt or trainaug.txt, and among "
            f"the lists (ImageSets/Segmentation) of {options.root} there is neither, there are {few(there) or 'none'}; "
            "--voc-list train learns from the 1,464 pictures of train.txt"
        )
    plan = Plan(**defaults.plan | given | {"recipe": dataclasses.replace(defaults.plan["recipe"], **given["recipe"])})
    begin(options.out, plan, _base(options), settings=_settings(options))
    return plan


def _given(options: argparse.Namespace) -> dict:
    """Return the fields of the plan that the user asks for, with those of the recipe in a dict of their own."""
    from ..models.phrases import read_phrases

    names = ("data", "setting", "method", "train_scenes", "test_scenes", "seed")
    given = {name: getattr(options, name) for name in names}
    given["root"] = options.root and str(Path(options.root).resolve())
    given["train_split"] = options.voc_list
    given["phrases"] = options.phrases and read_phrases(options.phrases)
    recipe = {name: getattr(options, name) for name in ("epochs", "batch_size", "learning_rate")}
    given["recipe"] = {name: value for name, value in recipe.items() if value is not None}
    return {name: value for name, value in given.items() if value is not None}


def _notes(plan) -> list[str]:
    """Return what a reader must know about the plan to compare its numbers with others."""
    notes = []
    if plan.data == "voc":
        notes.append(f"it learns from the pictures of VOC's list {plan.train_split}")
    single = [t + 1 for t, classes in enumerate(plan.tasks) if len(classes) == 1]
    if single:
        numbers = f"task {single[0]}" if len(single) == 1 else f"tasks {', '.join(map(str, single))}"
        weight = plan.recipe.one_class_token_weight
        what = f"the token loss (weight {weight:g}) tells where" if weight else "nothing tells where"
        notes.append(f"{numbers}: of one class, which every picture of the task shows; {what} it is not")
    return notes


def _settings(options: argparse.Namespace) -> dict:
    """Return the settings of the model that the user asks for."""
    given = {"rank": options.rank, "alpha": options.rank, "sites": options.sites}
    return {name: value for name, value in given.items() if value is not None}


def _base(options: argparse.Namespace) -> str | Path | tuple[str, str]:
    folders = (options.detector, options.sam)
    if options.base is not None:
        if folders != (None, None):
            raise ValueError("--base takes the place of --detector and --sam: give one or the other")
        return options.base
    if None not in folders:
        return folders
    if folders != (None, None) or options.data != "digits":
        raise ValueError("--detector and --sam are needed, both, or --base in their place")
    if not KEPT.is_dir():
        raise FileNotFoundError(f"this installation has no models for the digits ({KEPT}): --base or --detector, --sam")
    return KEPT


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Bars(Watch):
    """Shows a bar for the tasks, one for a task's epochs and one for its evaluation, and a table after every task."""

    def __init__(self, console, tasks: int, epochs: int, records: list[dict]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:22}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._records, self._tasks, self._epochs = records, tasks, epochs
        self._all = self.progress.add_task("tasks", total=tasks, completed=len(records), note="")
        self._learning = self.progress.add_task("", total=None, note="", visible=False)
        self._evaluating = self.progress.add_task("", total=None, note="", visible=False)

    def learning(self, t: int, classes: Sequence[str], pictures: int, steps: int, epoch: int) -> None:
        self.progress.update(self._all, description=f"task {t + 1} of {self._tasks}", note=few(classes))
        self.progress.reset(self._learning, total=self._epochs * steps, completed=epoch * steps, visible=True)
        self._name_epoch(epoch)

    def step(self, losses: Losses) -> None:
        note = ", ".join(f"{name} {loss:.3f}" for name, loss in losses._asdict().items() if loss)
        self.progress.update(self._learning, advance=1, note=note)

    def epoch(self, epoch: int, losses: Losses) -> None:
        self._name_epoch(epoch)

    def evaluating(self, t: int, pictures: int) -> None:
        about = f"evaluating 1 to {t + 1}" if t else "evaluating 1"
        self.progress.reset(self._evaluating, total=pictures, description=about, visible=True)

    def evaluated(self, pictures: int) -> None:
        self.progress.advance(self._evaluating, pictures)

    def measured(self, record: dict) -> None:
        self._records.append(record)
        self.progress.advance(self._all)
        if len(self._records) < self._tasks:
            self.progress.console.print(task_table(self._records, "mIoU so far, in %"))

    def _name_epoch(self, finished: int) -> None:
        now = min(finished + 1, self._epochs)
        self.progress.update(self._learning, description=f"epoch {now} of {self._epochs}")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return rate
