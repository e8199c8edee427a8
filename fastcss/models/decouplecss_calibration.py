"""Sets, for a trained task of DecoupleCSS, the thresholds of presence from which on a class counts as there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .class_detector import DetectedClasses
from .decouplecss import DecoupleCSS
from .decouplecss_training import activate, detect, embed_phrases, load_batches
from .task import Task
from .task_pictures import Batch, TaskPictures, token_shares


@torch.no_grad()
def calibrate(model: DecoupleCSS, task: Task, pictures: TaskPictures, batch_size: int = 24, workers: int = 0) -> Tensor:
    """Set the thresholds of presence of a trained task by the pictures it was trained on; return them, ``[c]``.

    Each of these pictures shows some class of the task; if the task has a single class, every picture shows it. So each
    picture counts twice: as it is, and as one that shows no class, without the tokens whose cells show a class or have
    pixels that do not count. See ``best_thresholds``. The model is left in eval mode.
    """
    model.eval()
    activate(model, task)
    phrases, presence, present = embed_phrases(model, task), [], []
    batches = torch.arange(len(pictures)).split(batch_size)
    for batch in load_batches(pictures, batches, workers):
        batch = batch.to(phrases.device)
        found, detected = detect(model, phrases, batch.pixel_values)
        presence += [found.presence, _presence_elsewhere(model, batch, detected)]
        present += [batch.present, torch.zeros_like(batch.present)]
    task.thresholds.copy_(best_thresholds(torch.cat(presence), torch.cat(present)))
    return task.thresholds


def _presence_elsewhere(model: DecoupleCSS, batch: Batch, detected: Sequence[DetectedClasses]) -> Tensor:
    """Compute r of eq. A.2 by the tokens that are on none of the task's classes, [B, c]."""
    levels = [of.shapes.tolist() for of in detected]
    elsewhere = (token_shares(batch, levels) == 0).all(1).split([len(of.tokens) for of in detected])
    return torch.cat(
        [  # the cosine with a row of zeros is 0, and below any threshold
            model.select(of._replace(tokens=(of.tokens * kept[:, None])[None], classes=of.classes[None])).presence
            for of, kept in zip(detected, elsewhere, strict=True)
        ]
    )


def best_thresholds(presence: Tensor, present: Tensor) -> Tensor:
    """Return for each class the threshold that tells best, by F1, which pictures show it.

    The threshold lies midway between the two neighbouring values of r that it separates. Of equally good ones it is the
    highest, since in other pictures more classes are absent. A class that no threshold finds in any picture gets
    infinity: it is never present.

    Args:
        presence: ``[n, c]``, r of eq. A.2; 0, if no token reaches τ, is never present.
        present: bool ``[n, c]``.

    Returns:
        The thresholds, ``[c]``.
    """
    score, order = presence.sort(dim=0, descending=True)
    hits = present.gather(0, order).cumsum(0)  # counts the true ones with the threshold just below each score
    found = torch.arange(1, len(score) + 1, device=score.device)[:, None]
    f1 = 2 * hits / (found + present.sum(0))
    below = torch.cat([score[1:], torch.zeros_like(score[:1])])
    f1 = f1.masked_fill((score <= below) | (score <= 0), 0)  # no threshold separates equal scores
    best = f1.argmax(0, keepdim=True)  # takes the first of equal ones, which has the highest score
    upper, lower = score.gather(0, best)[0], below.gather(0, best)[0]
    midway = (upper + lower) / 2
    midway = torch.where(midway > lower, midway, upper)  # the upper one if no number lies between the two
    return midway.masked_fill(f1.gather(0, best)[0] == 0, float("inf"))
