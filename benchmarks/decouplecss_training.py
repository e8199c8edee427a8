"""Cases of training DecoupleCSS: one step of the newest task, its losses, gradients and AdamW's update.

"fastcss" trains the last of T tasks; "one-task" takes the same step in the same model without the other tasks. Both
must give the same gradients; and since other tasks should cost nothing, both should take the same time and memory.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .cases import Case, Problem, Step
from .decouplecss import SOURCES, TINY, random_model

if TYPE_CHECKING:
    from fastcss.models.task_pictures import Batch

CLASSES, BATCH = 3, 2
#: Errors are relative to the largest gradient. A GPU adds up float32 sums in no fixed order; on a CPU both are equal.
TOLERANCE = 1e-5


def cases(device: str, quick: bool) -> list[Case]:
    found = []
    for tasks in (4,) if quick else (1, 2, 4, 8):
        shape = TINY | {"T": tasks, "classes": CLASSES, "B": BATCH}
        name = f"decouplecss_training/tiny-t{tasks}" + "-quick" * quick
        build = functools.partial(_problem, shape)
        found.append(Case("decouplecss_training", name, shape, torch.float32, build, SOURCES, modes=("bwd",)))
    return found


def _problem(shape: dict, device: str, mode: str) -> Problem:
    model = random_model(shape).to(device)
    alone = last_task_alone(model)
    batch = _batch(shape, model, device)
    expected = _step(alone, batch)
    expected()  # the first step makes AdamW's moments
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is none that the counter knows
        expected()
    providers = {"fastcss": lambda: _step(model, batch), "one-task": lambda: _step(alone, batch)}
    text = ("text_backbone", "text_projection")
    read = sum(p.nbytes for name, p in alone.named_parameters() if not any(part in name for part in text))
    learnt = sum(p.nbytes for p in alone.parameters() if p.requires_grad)
    # AdamW reads and writes the two moments of what is learnt, and writes the weights themselves.
    moved = read + 5 * learnt
    return Problem(providers, expected, TOLERANCE, counter.get_total_flops(), moved, capture=_no_graph)


def last_task_alone(model: nn.Module) -> nn.Module:
    """Copy the model with its last task only."""
    alone = copy.deepcopy(model)
    for task in alone.tasks[:-1]:
        alone.detector.delete_adapter(task.name)
    alone.tasks = alone.tasks[-1:]
    return alone


def _step(model: nn.Module, batch: Batch) -> Step:
    """Make a step that returns the losses and the gradients of what is learnt.

    AdamW does all its work at rate 0, and so every step is like the first.
    """
    from fastcss.models.decouplecss_training import activate, embed_phrases, training_step

    task = model.tasks[-1]
    learnt = list(activate(model, task).values())
    optimizer = torch.optim.AdamW(learnt, lr=0.0, weight_decay=0.05)
    phrases = embed_phrases(model, task)

    def step():
        losses = training_step(model, task, phrases, batch)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return *(loss.detach() for loss in losses), *(p.grad for p in learnt)

    return step


def _batch(shape: dict, model: nn.Module, device: str) -> Batch:
    """Draw pictures of noise that show every class, each in a band."""
    from fastcss.models.task_pictures import TaskPictures, collate

    height, width = shape["H"], shape["W"]
    labels = torch.arange(height * width).view(height, width) * (shape["classes"] + 1) // (height * width)
    items = [(torch.rand(3, height, width), labels) for _ in range(shape["B"])]
    numbers = range(1, shape["classes"] + 1)
    pictures = TaskPictures(items, numbers, model.segmenter, shortest=min(height, width), longest=max(height, width))
    return collate([pictures[i] for i in range(len(items))]).to(device)


def _no_graph(provider: str, step: Step) -> Step:
    raise RuntimeError("whose picture a mask is of is copied from the host, which no CUDA graph can hold")
