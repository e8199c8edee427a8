"""Computes the frozen text encoder's features of phrases once per model, and keeps them on disk with the task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import read_tensors

if TYPE_CHECKING:
    from .class_detector import ClassDetector
    from .task import Task

FILE = "phrases.safetensors"


@torch.no_grad()
def phrase_features(detector: ClassDetector, tasks: Sequence[Task]) -> list[Tensor]:
    """Return the features ``[c, M, D]`` of each task's phrases.

    A task keeps its features with a digest of what they depend on. They are computed anew if the digest differs: after
    the text encoder was changed, exchanged or cast, or with other phrases.
    """
    encoder = _text_encoder(detector)
    for task in tasks:
        digest = _digest(encoder, task)
        if task.phrase_features is None or not torch.equal(task.phrase_features["digest"], digest):
            features = detector.embed_phrases(task.input_ids, task.attention_mask)
            task.phrase_features = {"digest": digest, "features": features}
        task.phrase_features["features"] = task.phrase_features["features"].to(task.input_ids.device)
    return [task.phrase_features["features"] for task in tasks]


def save_phrase_features(task: Task, folder: Path) -> None:
    """Write the task's features, if they were computed."""
    if task.phrase_features is not None:
        save_file(task.phrase_features, folder / FILE, {"format": "pt"})


def load_phrase_features(task: Task, folder: Path) -> None:
    """Read the task's features, if the file exists; raise ValueError if it is incomplete, or of other phrases."""
    path = folder / FILE
    if not path.exists():
        return
    kept = read_tensors(path, "DecoupleCSS")
    shapes = {name: list(tensor.shape) for name, tensor in kept.items()}
    shape = list(task.input_ids.shape[:2])
    if shapes.keys() != {"digest", "features"} or shapes["digest"] != [32] or shapes["features"][:-1] != shape:
        raise ValueError(
            f"DecoupleCSS: {path} must hold digest [32] and features [{shape[0]}, {shape[1]}, D]: {shapes}"
        )
    task.phrase_features = kept


def _text_encoder(detector: ClassDetector) -> hashlib._Hash:
    digest = hashlib.sha256()
    for part in (detector.text_backbone, detector.text_projection):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest


def _digest(encoder: hashlib._Hash, task: Task) -> Tensor:
    """Return the digest of the text encoder and of the task's phrases, uint8 [32]."""
    digest = encoder.copy()
    for tensor in (task.input_ids, task.attention_mask):
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
