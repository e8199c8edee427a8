"""Holds a task of a DecoupleCSS model: its classes, their phrases and what was learned of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .prompt_generator import PromptGenerator


@dataclasses.dataclass(frozen=True)
class Phrases:
    """Holds word ids of M phrases for each of c classes, [c, M, L], and a mask that says which of them are words."""

    input_ids: Tensor
    attention_mask: Tensor


class Task(nn.Module):
    """Holds what belongs to one task alone, except its adapter, which has the task's name."""

    def __init__(self, name: str, classes: Sequence[str], phrases: Phrases, generator: PromptGenerator) -> None:
        super().__init__()
        self.name, self.classes = name, tuple(classes)
        self.register_buffer("input_ids", phrases.input_ids, persistent=False)
        self.register_buffer("attention_mask", phrases.attention_mask, persistent=False)
        self.register_buffer("thresholds", torch.zeros(len(classes)))  # of each class's presence
        self.generator = generator
        self.phrase_features: dict[str, Tensor] | None = None  # the module of that name explains it
