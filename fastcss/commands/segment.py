"""Runs ``python -m fastcss segment``: makes label maps and overlays of pictures, by the model of a run."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

HELP = "label every pixel of pictures with the classes of all tasks"
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("one_pass", "shared", "literal")
KEPT = Path(__file__).parents[1] / "assets" / "digits"


class Output(NamedTuple):
    """Names the files that are written for one picture."""

    labels: Path
    overlay: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a file of any format that Pillow reads")
    parser.add_argument(
        "--model", metavar="RUN", type=Path, default=KEPT,
        help="folder of a run, as `train` makes it (default: the one in the package, which finds handwritten digits)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True,
        help="folder for <stem>.png, whose palette indices are 0 for background and 1 + k for class k, "
        "and <stem>_overlay.png",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, default=MODES[0],
        help="one pass over all tasks; shared: adapters switched, the rest once a picture; literal: everything once a "
        "task, as published; the labels are the same (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="dtype to compute in (default: the run's). bfloat16 is fast on CPUs that multiply it, as those with "
        "AVX512-BF16 or AMX do; float16 is nearer to float32, and slow on most CPUs",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Segment one picture after the other; pictures that cannot be read are named at the end.

    Raises:
        IsADirectoryError: a folder is in the place of a result.
        ValueError: two pictures have the same stem, a picture would be overwritten, or the run does not exist or has no
            tasks. At the end: some pictures could not be read or labelled; all others are done.
        OSError: a result cannot be written; those before it are kept.
    """
    from ..models.decouplecss_folder import read_training

    outputs = _outputs(options.pictures, options.out)
    read_training(options.model)  # refuses a folder that is no run before any picture is read
    model, failed = None, []
    with _progress(len(outputs)) as progress, contextlib.closing(_read_ahead(options.pictures)) as images:
        for picture, output in progress.track(list(zip(options.pictures, outputs, strict=True))):
            image = next(images)
            if isinstance(image, FileNotFoundError):
                failed.append(f"{picture}: no such file")
                continue
            if isinstance(image, ValueError):
                failed.append(str(image))
                continue
            if isinstance(image, Exception):
                raise image
            if model is None:  # loaded only once a picture could be read
                model = _Model(options.model, options.mode, options.dtype)
                options.out.mkdir(parents=True, exist_ok=True)
            try:
                print("\n".join(model.segment(picture, image, output)), flush=True)
            except (
                MemoryError,
                RuntimeError,
            ) as error:  # this picture failed, perhaps as too large for the memory; others may not
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                failed.append(f"{picture}: it cannot be labelled at {image.shape[2]}×{image.shape[1]} pixels: {reason}")
    if failed:
        many = f"{len(failed)} of {len(outputs)} pictures could not be labelled: " if len(outputs) > 1 else ""
        raise ValueError(many + "; ".join(failed))


def _read_ahead(pictures: Sequence[str]) -> Generator[Tensor | Exception, None, None]:
    """Yield each picture, or why it cannot be read; meanwhile read the next, and no further, as they may be large.

    The thread is a daemon, so that a file that never ends keeps no interrupted process.
    """
    from ..data import read_image

    wanted: SimpleQueue[str | None] = SimpleQueue()
    found: SimpleQueue[Tensor | Exception] = SimpleQueue()

    def read() -> None:
        for picture in iter(wanted.get, None):
            try:
                found.put(read_image(picture))
            except Exception as error:
                found.put(error)

    threading.Thread(target=read, name="fastcss segment reads", daemon=True).start()
    try:
        wanted.put(pictures[0])
        for following in (*pictures[1:], None):
            image = found.get()
            wanted.put(following)
            yield image
    finally:
        wanted.put(None)


class _Model:
    """Holds the model of a run, and the sizes to which its pictures are brought."""

    def __init__(self, folder: Path, mode: str, dtype: str | None) -> None:
        from ..models.continual import load_run
        from ..models.decouplecss_folder import load, read_training

        self.mode, self.sides = mode, {}
        to = None if dtype is None else getattr(torch, dtype)
        if read_training(folder) is None:
            self.model = load(folder, dtype=to)
        else:
            self.model, plan = load_run(folder, dtype=to)
            self.sides = {"shortest": plan.shortest, "longest": plan.longest}
        if not self.model.tasks:
            raise ValueError(f"{folder} is a run that has learned no task yet")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def segment(self, name: str, image: Tensor, output: Output) -> Iterator[str]:
        """Write the results for ``image``, float32 [3, H, W], and yield a report of them line by line."""
        from ._overlay import label_image, overlay

        start = time.perf_counter()
        labels, present, presence = self._labels(image)
        seconds = time.perf_counter() - start
        classes = self.model.classes
        _save(label_image(labels, len(classes)), output.labels)
        _save(overlay(image, labels, classes), output.overlay)
        yield f"{name}: {image.shape[2]}×{image.shape[1]} pixels, {seconds:.2f} s → {output.labels}, {output.overlay}"
        yield from self._found(labels, present, presence)

    def _labels(self, image: Tensor) -> tuple[Tensor, list[bool], list[float]]:
        """Return the label map of one picture, and for every class whether it was found and how surely."""
        from ..models.preprocessing import preprocess

        device = next(self.model.parameters()).device
        picture = preprocess(image, sam_side=self.model.segmenter.image_size, **self.sides)
        found = self.model.segment(
            picture.pixel_values[None].to(device),
            picture.sam_pixel_values[None].to(device),
            [picture.size],
            crops=[picture.crop],
            mode=self.mode,
        )
        return found.labels[0].cpu(), found.present[0].tolist(), found.presence[0].tolist()

    def _found(self, labels: Tensor, present: Sequence[bool], presence: Sequence[float]) -> Iterator[str]:
        from ._overlay import percent

        counts = labels.flatten().bincount(minlength=len(present) + 1).tolist()
        first = 0
        for task in self.model.tasks:
            texts = [
                f"{name} (presence {presence[k]:.2f}, {percent(counts[1 + k] / labels.numel())} of pixels)"
                for k, name in enumerate(task.classes, first)
                if present[k]
            ]
            yield f"  {task.name}: {', '.join(texts) or 'nothing'}"
            first += len(task.classes)


def _outputs(pictures: Sequence[str], out: Path) -> list[Output]:
    """Return where each picture's results go; raise if one would replace an input, another result or a folder."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {out} is no folder")
    inputs = {Path(picture).resolve() for picture in pictures}
    outputs, owners = [], {}
    for picture in pictures:
        stem = Path(picture).stem
        outputs.append(Output(out / f"{stem}.png", out / f"{stem}_overlay.png"))
        for path in outputs[-1]:
            if path in owners:
                raise ValueError(f"{owners[path]} and {picture} would both be written to {path}")
            if path.is_dir():
                raise IsADirectoryError(f"--out: {path}, which is to be written for {picture}, is a folder")
            if path.resolve() in inputs:
                raise ValueError(f"--out: {path} is one of the pictures, and would be overwritten")
            owners[path] = picture
    return outputs


def _progress(count: int) -> Progress:
    """Make a bar, which is shown for more than one picture and on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    printed = sys.stdout.isatty()  # otherwise the output goes elsewhere, and must not pass through the bar
    console = Console(stderr=not printed)
    columns = (TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = count < 2 or not console.is_terminal
    return Progress(*columns, console=console, redirect_stdout=printed, disable=hidden)


def _save(picture: Image, path: Path) -> None:
    from .._files import whole_file

    with whole_file(path, binary=True) as file:
        picture.save(file, "PNG")
