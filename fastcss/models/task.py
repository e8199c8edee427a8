"""A task of a DecoupleCSS model: its classes, their phrases and what was learned of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .prompt_generator import PromptGenerator


@dataclasses.dataclass(frozen=True)
class Phrases:
    """Word ids of M phrases for each of c classes, [c, M, L], and where they are words."""

    input_ids: Tensor
    attention_mask: Tensor


class Task(nn.Module):
    """What one task has of its own, beside the adapter of its name."""

    def __init__(self, name: str, classes: Sequence[str], phrases: Phrases, generator: PromptGenerator) -> None:
        super().__init__()
        self.name, self.classes = name, tuple(classes)
        self.register_buffer("input_ids", phrases.input_ids, persistent=False)
        self.register_buffer("attention_mask", phrases.attention_mask, persistent=False)
        self.register_buffer("thresholds", torch.zeros(len(classes)))  # of presence
        self.generator = generator
        self.phrase_features: dict[str, Tensor] | None = None  # see the module of that name
