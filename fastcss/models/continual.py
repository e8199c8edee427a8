"""Learns task after task with DecoupleCSS, in a folder from which a killed run goes on.

::

    config.json, base/, task_0/ …    see decouplecss_folder; config.json holds the plan
    progress/                        the result of the finished epochs of the task that is being learned
    metrics.jsonl                    {"kind": "task", …} after every task, {"kind": "summary", …} at the end

Every task begins from what the folder holds, even if nothing interrupts the run. So a run that was interrupted reaches
the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .._fuse.fusion import fuse
from ..data import ContinualMetrics, Overlapped, training_set
from .class_detector import ClassDetector
from .continual_evaluation import evaluate
from .continual_plan import DEFAULTS, Plan, check_same
from .continual_progress import FOLDER, read_progress, restore, save_progress
from .continual_watch import Watch
from .decouplecss import DecoupleCSS
from .decouplecss_calibration import calibrate
from .decouplecss_folder import (
    checkpoint_folders,
    load,
    read_generator,
    read_settings,
    read_training,
    save_base,
    save_task,
    saved_tasks,
)
from .decouplecss_training import TaskTrainer
from .metrics_file import append_metrics, read_metrics
from .phrases import describe, encode, load_tokenizer
from .sam import SamSegmenter
from .task_pictures import TaskPictures

LOCK = ".lock"


def begin(
    folder: str | Path, plan: Plan, base: str | Path | tuple[str | Path, str | Path], *, settings: dict | None = None
) -> None:
    """Begin a run; one that was begun with the same plan and settings is left as it is.

    Args:
        folder: folder of the run.
        plan: what the run is to do.
        base: where the frozen models and the tokenizer come from: a run, whose ``base`` is copied, or the folders of
            Grounding DINO and of SAM, which the run then refers to. It is ignored if the run exists.
        settings: settings of ``DecoupleCSS``. A setting that is not given comes from the base run if it depends on the
            frozen models (where adapters sit, sizes of an initial generator), and otherwise from the data set's
            ``DEFAULTS``.

    Raises:
        FileNotFoundError: the data, the base or its tokenizer is missing.
        ValueError: the run was begun with another plan or settings, a task has no pictures, or the base is incomplete
            or does not fit the settings.
        OSError: the run cannot be written.
    """
    folder, settings = Path(folder), settings or {}
    if (folder / "config.json").exists():
        check_same(read_plan(folder).to_json(), plan.to_json(), str(folder))
        check_same(kept := read_settings(folder), kept | settings, str(folder))
        return
    _check_data(plan)
    copied = not isinstance(base, tuple)
    places = checkpoint_folders(base) if copied else dict(zip(("detector", "segmenter"), base, strict=True))
    tokenizer = load_tokenizer(places["detector"])
    for t in range(len(plan.tasks)):
        encode(tokenizer, describe(plan.classes(t), own=plan.phrases))
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        detector = ClassDetector.from_folder(places["detector"])
        segmenter = SamSegmenter.from_folder(places["segmenter"])
        generator = read_generator(base, segmenter.prompt_dim) if copied else None
        dictated = _dictated(base, settings, generator is not None) if copied else {}
        settings = DEFAULTS[plan.data].settings | dictated | settings
        model = DecoupleCSS(detector, segmenter, **settings, initial_generator=generator)
    named = {} if copied else places
    save_base(model, folder, **named, tokenizer=tokenizer, training=plan.to_json())


def train(folder: str | Path, *, watch: Watch | None = None, workers: int = 0, device: str = "cpu") -> dict:
    """Continue a run from the last finished epoch to the end; return its summary.

    Args:
        folder: folder of a run that was begun.
        watch: is told what goes on.
        workers: how many processes read pictures; 0 reads them in this one.
        device: device to learn on. On a GPU, or with another number of threads, sums may be taken in another order, so
            that a run may not be the same bit for bit.

    Raises:
        FileNotFoundError, ValueError: the run does not exist or is incomplete, or its data are gone.
        BlockingIOError: another process is training the run.
        FloatingPointError: a loss was not finite.
        OSError: the run cannot be written; what was finished is kept.
    """
    folder, watch = Path(folder), watch or Watch()
    plan = read_plan(folder)
    summary = _summary(folder)
    if summary is None:
        with _alone(folder):
            summary = _summary(folder) or _Run(folder, plan, watch, workers, device).finish()
            (folder / LOCK).unlink(missing_ok=True)  # safe: a process that makes another lock now finds a finished run
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return summary


def load_run(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[DecoupleCSS, Plan]:
    """Load the model of a run as its method has trained it so far, and its plan.

    In a naive run all tasks share one adapter, the last; the folder keeps its state after every task.

    Args:
        folder: folder of the run.
        dtype: dtype to segment in, as for ``decouplecss_folder.load``.

    Raises:
        FileNotFoundError, ValueError: as for ``decouplecss_folder.load``, or the run has no plan.
    """
    plan = read_plan(folder)
    model = load(folder, dtype=dtype)
    if plan.method == "naive" and model.tasks:
        share_last_adapter(model)
    return model, plan


def read_plan(folder: str | Path) -> Plan:
    """Read the plan that a run was begun with; raise ValueError if it has none."""
    content = read_training(folder)
    if content is None:
        raise ValueError(f"{folder} is a run without a plan: it was not begun with train")
    try:
        return Plan.from_json(content)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / 'config.json'}: {error}") from error


def share_last_adapter(model: DecoupleCSS) -> None:
    """Give every task the adapter of the last one, as if a single adapter had been fine-tuned."""
    last = model.tasks[-1].name
    for task in model.tasks[:-1]:
        _copy_adapter(model, last, task.name)
    model.eval()  # drops what was packed, which has the old weights


def _summary(folder: Path) -> dict | None:
    """Return the summary of a finished run, or None."""
    return next((record for record in read_metrics(folder) if record.get("kind") == "summary"), None)


@dataclasses.dataclass
class _Run:
    """Continues a run; knows where it is, how it goes on, and who is told."""

    folder: Path
    plan: Plan
    watch: Watch
    workers: int
    device: str

    def finish(self) -> dict:
        """Do all that is left to do; return the summary."""
        plan, data, test = self.plan, self.plan.training_data(), self.plan.test_data()
        metrics = ContinualMetrics(plan.tasks, [len(training_set(test, classes)) for classes in plan.tasks])
        for record in read_metrics(self.folder):
            if record.get("kind") == "task":
                metrics.add(record["iou"])
        for t in range(len(metrics.rows), len(plan.tasks)):
            learned = saved_tasks(self.folder)
            if learned not in (t, t + 1):
                raise ValueError(f"{self.folder} has {learned} tasks, and its metrics.jsonl {t}")
            if learned == t:
                self.learn(t, data)
            self.measure(t, metrics, test)
        about = {"method": plan.method, "setting": plan.setting, "data": plan.data, "seed": plan.seed}
        about |= {"train_split": plan.train_split, "train_pictures": len(data)}
        summary = {"kind": "summary", **metrics.summary(), **about}
        append_metrics(self.folder, summary)
        return summary

    def learn(self, t: int, data: Dataset) -> None:
        """Learn task t from the last of its epochs that was kept, and save it."""
        plan, model = self.plan, self.with_new_task(t).to(self.device)
        if torch.device(self.device).type == "cpu":  # fusion makes a step faster there
            # The trainer does not fuse, since its caller may need the model as it was. This model belongs to nobody
            # else, and is gone when the task is saved. An interrupted task is fused again, so it gives the same bits.
            fuse(model.detector)
        seen = training_set(data, plan.tasks[t])
        pictures = TaskPictures(seen, plan.tasks[t], model.segmenter, plan.shortest, plan.longest)
        recipe = dataclasses.replace(plan.recipe, seed=plan.seed_of(t))
        trainer, seconds = TaskTrainer(model, model.tasks[t], pictures, recipe, self.workers), 0.0
        progress = read_progress(self.folder, t)
        if progress is not None:
            restore(self.folder, trainer)
            seconds = progress["seconds"]
        steps = math.ceil(len(pictures) / recipe.batch_size)
        self.watch.learning(t, plan.classes(t), len(pictures), steps, trainer.epoch)
        while trainer.epoch < recipe.epochs:
            start = time.perf_counter()
            losses = trainer.run_epoch(self.watch.step)
            seconds += time.perf_counter() - start
            save_progress(self.folder, t, trainer, losses, seconds)
            self.watch.epoch(trainer.epoch, losses)
        calibrate(model, trainer.task, pictures, recipe.batch_size, self.workers)
        save_task(model, t, self.folder)

    def with_new_task(self, t: int) -> DecoupleCSS:
        """Return the saved model with task t as it is before it learns."""
        model, names = load(self.folder), self.plan.classes(t)
        tokenizer = load_tokenizer(checkpoint_folders(self.folder)["detector"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed_of(t))
            task = model.add_task(names, encode(tokenizer, describe(names, own=self.plan.phrases)))
        if self.plan.method == "naive" and t > 0:
            _copy_adapter(model, model.tasks[t - 1].name, task.name)
        return model

    def measure(self, t: int, metrics: ContinualMetrics, test: Dataset) -> None:
        """Evaluate all classes up to task t, which is saved, and add its line to the metrics."""
        plan, model = self.plan, load_run(self.folder)[0].to(self.device)
        seen = Overlapped(test, [label for labels in plan.tasks[: t + 1] for label in labels])
        self.watch.evaluating(t, len(seen))
        sides = (plan.shortest, plan.longest)
        iou = evaluate(model, seen, plan.labels, *sides, workers=self.workers, report=self.watch.evaluated)
        progress = read_progress(self.folder, t) or {}
        record = {"kind": "task", **metrics.add(iou), "classes": plan.classes(t)}
        record |= {name: progress.get(name) for name in ("loss", "seconds")}
        append_metrics(self.folder, record)
        self.watch.measured(record)


def _copy_adapter(model: DecoupleCSS, source: str, target: str) -> None:
    from peft import get_peft_model_state_dict

    own, places = (
        get_peft_model_state_dict(model.detector, adapter_name=name, save_embedding_layers=False)
        for name in (source, target)
    )
    with torch.no_grad():
        for name, place in places.items():  # the tensors are views of the adapter's parameters
            place.copy_(own[name])


def _dictated(base: str | Path, settings: dict, has_generator: bool) -> dict:
    """Return the settings that a run's frozen models dictate; raise ValueError if ``settings`` contradict them."""
    sizes = ("length", "prompts", "hidden") if has_generator else ()
    dictated = {name: value for name, value in read_settings(base).items() if name in ("sites", *sizes)}
    for name in sizes:
        if settings.get(name, dictated[name]) != dictated[name]:
            raise ValueError(
                f"{name} must be {dictated[name]}, as the initial generator of {base} has it, got {settings[name]}"
            )
    return dictated


def _check_data(plan: Plan) -> None:
    """Check, before anything is written, that the data exist and show some class of every task."""
    data, _ = plan.training_data(), plan.test_data()
    for t, classes in enumerate(plan.tasks):
        if not len(training_set(data, classes)):
            raise ValueError(f"no training picture shows any class of task {t + 1}: {', '.join(plan.classes(t))}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock that lets one process at a time train; the system releases it when the process ends or is killed.

    A ``flock`` of the folder itself would not do: processes that read pictures would share it, and outlive a killed
    parent.
    """
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(errno.EAGAIN, "another process is training this run", str(folder)) from error
        yield
