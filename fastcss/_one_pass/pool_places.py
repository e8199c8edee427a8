"""Says where each adapter of a pool lies in its arena, and which one makes room for another."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from .pool_files import AdapterFile


@dataclasses.dataclass
class Block:
    """Holds where one adapter lies in the arena, in floats, and who uses it.

    Attributes:
        starts: where the part of each layer begins, in the order of the adapter's pieces.
        users: how many calls hold it; with one or more it is not evicted.
        ready, failed: its weights are there, or could not be read.
        loaded, used: on a GPU, events after its copy and after the last call that read it.
    """

    start: int
    end: int
    starts: tuple[int, ...]
    users: int = 0
    ready: bool = False
    failed: bool = False
    loaded: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None


class Places:
    """Gives the adapters that are in memory a block each, the least recently used ones' to others that want it.

    Its user holds a lock around each call.

    Args:
        files: the adapters; the caller may replace one by another of the same layers and ranks.
        widths: of each linear layer, by name, K + N: its rows begin at a multiple of that.
        room: floats that there are at most.
        evicted: is called with each adapter that has lost its place, and its block.

    Attributes:
        blocks: adapter → its block, the least recently used first.
        size: floats of the arena, no more than all adapters take.
        most: the floats that each adapter takes at most, wherever it lies.
    """

    def __init__(
        self,
        files: Sequence[AdapterFile],
        widths: Mapping[str, int],
        room: int,
        evicted: Callable[[int, Block], None],
    ) -> None:
        self._files, self._widths, self._evicted = files, widths, evicted
        self.blocks: collections.OrderedDict[int, Block] = collections.OrderedDict()
        sizes = {id(file.pieces): self._size(file) for file in {id(file.pieces): file for file in files}.values()}
        self.most = [sizes[id(file.pieces)] for file in files]
        self.size = min(room, sum(self.most))

    def take(self, wanted: Sequence[int], keep: frozenset[int]) -> list[int] | None:
        """Give every wanted adapter a place, evicting others; return those to load, or None if there is no room.

        What is in ``keep`` or held by a call is not evicted. The last of ``wanted`` becomes the most recently used.
        """
        new = []
        for t in wanted:
            if t not in self.blocks:
                while (block := self._fitting(t)) is None:
                    oldest = next(
                        (o for o, b in self.blocks.items() if not b.users and b.ready and o not in keep), None
                    )
                    if oldest is None:
                        self.evict(new)
                        return None
                    self.evict([oldest])
                self.blocks[t] = block
                new.append(t)
            self.blocks.move_to_end(t)
        return new

    def evict(self, adapters: Sequence[int]) -> None:
        for t in adapters:
            self._evicted(t, self.blocks.pop(t))

    def end_of(self, adapters: Sequence[int]) -> int:
        """Return where these adapters end, in floats, one after the other in an empty arena."""
        end = 0
        for t in adapters:
            _, end = self._layout(t, end)
        return end

    def _fitting(self, t: int) -> Block | None:
        """Find the first gap that holds adapter ``t``."""
        taken = sorted((block.start, block.end) for block in self.blocks.values())
        start = 0
        for first, end in [*taken, (self.size, 0)]:
            starts, last = self._layout(t, start)
            if last <= first:
                return Block(start, last, starts)
            start = end
        return None

    def _layout(self, t: int, start: int) -> tuple[tuple[int, ...], int]:
        """Lay adapter ``t`` out from ``start`` on; return where each layer's part begins, and the end."""
        pieces = self._files[t].pieces
        order = sorted(range(len(pieces)), key=lambda i: -self._widths.get(pieces[i].layer, 1))
        starts = [0] * len(pieces)
        for i in order:
            width = self._widths.get(pieces[i].layer, 1)
            starts[i] = -(-start // width) * width
            start = starts[i] + pieces[i].floats
        return tuple(starts), start

    def _size(self, file: AdapterFile) -> int:
        widths = {self._widths.get(piece.layer, 1) for piece in file.pieces}
        return sum(widths) + sum(piece.floats for piece in file.pieces)
