"""Keeps the progress of a task that is being learned, after every epoch.

::

    progress/progress.json          task, finished epochs, the last one's mean losses, seconds of all of them
    progress/task.safetensors       the task's parameters
    progress/trainer.safetensors    TaskTrainer.state_dict()
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .._files import read_tensors, standing_folder, whole_folder
from .checkpoint import check_tensors
from .decouplecss_training import Losses, TaskTrainer, activate

FOLDER = "progress"


def save_progress(folder: Path, t: int, trainer: TaskTrainer, losses: Losses, seconds: float) -> None:
    """Save the state of task t after an epoch, whole or not at all, in place of the epoch before."""
    about = {
        "task": t,
        "epoch": trainer.epoch,
        "loss": {name: loss.item() for name, loss in losses._asdict().items()},
        "seconds": seconds,
    }
    parameters = activate(trainer.model, trainer.task)
    with whole_folder(folder / FOLDER, overwrite=True) as new:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, new / "task.safetensors")
        save_file(trainer.state_dict(), new / "trainer.safetensors")
        (new / "progress.json").write_text(json.dumps(about), encoding="utf-8")


def read_progress(folder: Path, t: int) -> dict | None:
    """Read what ``save_progress`` last wrote of task t; None if it wrote nothing, or about another task."""
    path = standing_folder(folder / FOLDER) / "progress.json"
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return about if about["task"] == t else None


@torch.no_grad()
def restore(folder: Path, trainer: TaskTrainer) -> None:
    """Bring a new trainer and its task to the state in which ``save_progress`` was called."""
    kept = standing_folder(folder / FOLDER)
    tensors = read_tensors(kept / "task.safetensors", "train")
    parameters = activate(trainer.model, trainer.task)
    check_tensors(tensors, parameters, f"train: {kept / 'task.safetensors'}")
    trainer.load_state_dict(read_tensors(kept / "trainer.safetensors", "train"))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
