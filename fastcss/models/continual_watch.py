"""What there is to tell while a continual run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decouplecss_training import Losses


class Watch:
    """Told by ``continual.train`` what it does; takes no notice. Override what is to be shown."""

    def learning(self, t: int, classes: Sequence[str], pictures: int, steps: int, epoch: int) -> None:
        """Task t is learned from so many pictures, in so many steps an epoch; so many epochs are finished."""

    def step(self, losses: Losses) -> None:
        """A batch was learned."""

    def epoch(self, epoch: int, losses: Losses) -> None:
        """So many epochs are finished and kept; the last one's mean losses."""

    def evaluating(self, t: int, pictures: int) -> None:
        """All classes up to task t are evaluated, on so many pictures."""

    def evaluated(self, pictures: int) -> None:
        """So many more pictures were."""

    def measured(self, record: dict) -> None:
        """A line was added to ``metrics.jsonl``."""
