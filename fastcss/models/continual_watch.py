"""Reports what a continual run does while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decouplecss_training import Losses


class Watch:
    """Is told by ``continual.train`` what it does, and ignores it. Override the methods for what you want to show."""

    def learning(self, t: int, classes: Sequence[str], pictures: int, steps: int, epoch: int) -> None:
        """Note that task t is learned from ``pictures``, with ``steps`` per epoch; ``epoch`` epochs are finished."""

    def step(self, losses: Losses) -> None:
        """Note that a batch was learned."""

    def epoch(self, epoch: int, losses: Losses) -> None:
        """Note that ``epoch`` epochs are finished and kept; ``losses`` are the last one's means."""

    def evaluating(self, t: int, pictures: int) -> None:
        """Note that all classes up to task t are evaluated, on ``pictures`` pictures."""

    def evaluated(self, pictures: int) -> None:
        """Note that ``pictures`` more pictures were evaluated."""

    def measured(self, record: dict) -> None:
        """Note that a line was added to ``metrics.jsonl``."""
