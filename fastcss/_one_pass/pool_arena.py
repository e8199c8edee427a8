"""Holds the adapters of a pool that are in memory: one allocation, in which each takes a block and gives it back.

This is the unified paging of S-LoRA (Sheng et al. 2023, §5): adapters of any ranks, of all layers, share one arena, and
a layer's kernel reads rows of it where they lie. Row i of a linear layer's adapter is row i of A followed by row i of
Bᵀ, so the arena seen as [rows, K + N] is the A of that layer in its first K columns and the Bᵀ in the others.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .pool_files import POOL, AdapterFile, Piece

BYTES = 4  # of float32, in which PEFT runs the adapters it loads


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


class Arena:
    """Pages adapters in and out of ``budget`` bytes; several threads may hold some at once.

    Args:
        files: the adapters.
        widths: of each linear layer, by name, K + N.
        budget: bytes that the adapters in memory take at most.

    Attributes:
        memory: float32, the one allocation.
        spans: int32 [layers, T, 2], first row and end of each adapter in each linear layer; -1 for one that is not in
            memory, 0 and 0 for one that does not cover the layer.
        loads: how many adapters have been read from their files.
    """

    def __init__(self, files: Sequence[AdapterFile], widths: dict[str, int], budget: int, device: torch.device) -> None:
        self.files, self.device, self.budget = list(files), device, budget
        self.layers = {layer: number for number, layer in enumerate(widths)}
        self._widths, self.loads = widths, 0
        self._sizes: dict[int, int] = {}  # by the id of an adapter's pieces, which folders that are alike share
        self._blocks: collections.OrderedDict[int, Block] = collections.OrderedDict()  # the least recently used first
        self._changed = threading.Condition()
        self._holders: collections.Counter[int] = collections.Counter()  # threads, by how many calls they are in
        self._held = threading.local()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._evicted: list[torch.cuda.Event] = []  # what the next copy into the arena waits for
        largest = max(range(len(self.files)), key=self._most)
        if self.bytes_of([largest]) > budget:
            raise ValueError(
                f"{POOL}: budget is {_mib(budget)}, and adapter {self.files[largest].name!r} alone takes "
                f"{_mib(self.bytes_of([largest]))} ({self.bytes_of([largest]):,} bytes)"
            )
        size = min(budget // BYTES, sum(map(self._most, range(len(self.files)))))
        with torch.inference_mode(False):
            self.memory = torch.empty(size, device=device)
            self.spans = torch.full((len(widths), len(self.files), 2), -1, dtype=torch.int32, device=device)
        covers = {(piece.layer, t) for t, file in enumerate(self.files) for piece in file.pieces}
        bare = [(number, t) for layer, number in self.layers.items() for t in range(len(self.files))
                if (layer, t) not in covers]  # fmt: skip
        if bare:
            self.spans[tuple(torch.tensor(bare, device=device).t())] = 0

    # ---------------------------------------------------------------------------------------------- held by a call

    @contextlib.contextmanager
    def holding(self, wanted: Sequence[int]) -> Iterator[None]:
        """Have these adapters in memory while the context lasts; read those that are not.

        Raises:
            FileNotFoundError, RuntimeError: a folder is gone or has changed, named in the message.
            ValueError: they do not fit the budget together.
        """
        for t in wanted:
            self.files[t].check()
        if sum(map(self._most, wanted)) > self.memory.numel() and self.bytes_of(wanted) > self.memory.numel() * BYTES:
            raise ValueError(
                f"{POOL}: the {len(wanted)} adapters of this call take {_mib(self.bytes_of(wanted))} together, and the "
                f"budget is {_mib(self.budget)}; give budget={self.bytes_of(wanted):,} or more, or route fewer "
                "adapters a call"
            )
        before, me = getattr(self._held, "tasks", ()), threading.get_ident()
        blocks = self._hold(wanted, me)
        self._held.tasks = tuple(wanted)
        try:
            yield
        finally:
            self._held.tasks = before
            self._release(blocks, me)

    @property
    def held(self) -> tuple[int, ...]:
        """Return the adapters that this thread's call holds."""
        return self._held.tasks

    def _hold(self, wanted: Sequence[int], me: int) -> list[Block]:
        while True:
            with self._changed:
                blocks, missing = self._pin(wanted, me)
            try:
                for t in missing:
                    self._load(t)
                with self._changed:  # other threads may be loading the rest
                    self._changed.wait_for(lambda: all(block.ready or block.failed for block in blocks))  # noqa: B023
            except BaseException:
                self._release(blocks, me, missing)
                raise
            if not any(block.failed for block in blocks):
                break
            self._release(blocks, me)  # this thread tries itself, and says what is wrong
        for block in blocks:
            if block.loaded is not None:
                torch.cuda.current_stream(self.device).wait_event(block.loaded)
        return blocks

    def _pin(self, wanted: Sequence[int], me: int) -> tuple[list[Block], list[int]]:
        """Take a place for every wanted adapter, waiting for other threads' calls if need be.

        Return the places, and the adapters that this thread has to load.
        """
        while True:
            placed = self._place(wanted, keep=frozenset(wanted))
            if placed is None and not any(block.users for block in self._blocks.values()):
                self._evict(list(self._blocks))  # what lay between the blocks was too small: they fit from the start
                placed = self._place(wanted, keep=frozenset())
            if placed is not None:
                blocks = [self._blocks[t] for t in wanted]
                for block in blocks:
                    block.users += 1
                self._holders[me] += 1
                return blocks, placed
            if set(+self._holders) == {me}:
                raise RuntimeError(
                    f"{POOL}: a call inside of another call of the same pool does not fit the budget beside it "
                    f"({_mib(self.budget)})"
                )
            self._changed.wait()

    def _release(self, blocks: Sequence[Block], me: int, unread: Sequence[int] = ()) -> None:
        used = None
        if self._side is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self.device))
        with self._changed:
            for block in blocks:
                block.users, block.used = block.users - 1, used
            for t in unread:
                if not self._blocks[t].ready:
                    self._blocks[t].failed = True
                    self._evict([t])
            self._holders[me] -= 1
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------------- the arena's places

    def _place(self, wanted: Sequence[int], keep: frozenset[int]) -> list[int] | None:
        """Give every wanted adapter a place, evicting others; return those to load, or None if there is no room.

        What is in ``keep`` or held by a call is not evicted. The last of ``wanted`` becomes the most recently used.
        """
        new = []
        for t in wanted:
            if t not in self._blocks:
                while (block := self._fitting(t)) is None:
                    oldest = next(
                        (o for o, b in self._blocks.items() if not b.users and b.ready and o not in keep), None
                    )
                    if oldest is None:
                        self._evict(new)
                        return None
                    self._evict([oldest])
                self._blocks[t] = block
                new.append(t)
            self._blocks.move_to_end(t)
        return new

    def _fitting(self, t: int) -> Block | None:
        """Find the first gap that holds adapter ``t``."""
        taken = sorted((block.start, block.end) for block in self._blocks.values())
        start = 0
        for first, end in [*taken, (self.memory.numel(), 0)]:
            starts, last = self._layout(t, start)
            if last <= first:
                return Block(start, last, starts)
            start = end
        return None

    def _layout(self, t: int, start: int) -> tuple[tuple[int, ...], int]:
        """Lay adapter ``t`` out from ``start`` on; rows of a width begin at a multiple of it. Return starts and end."""
        pieces = self.files[t].pieces
        order = sorted(range(len(pieces)), key=lambda i: -self._widths.get(pieces[i].layer, 1))
        starts = [0] * len(pieces)
        for i in order:
            width = self._widths.get(pieces[i].layer, 1)
            starts[i] = -(-start // width) * width
            start = starts[i] + pieces[i].floats
        return tuple(starts), start

    def _most(self, t: int) -> int:
        """Return the floats that adapter ``t`` takes at most, wherever it lies."""
        pieces = self.files[t].pieces
        if id(pieces) not in self._sizes:
            widths = {self._widths.get(piece.layer, 1) for piece in pieces}
            self._sizes[id(pieces)] = sum(widths) + sum(piece.floats for piece in pieces)
        return self._sizes[id(pieces)]

    def bytes_of(self, adapters: Sequence[int]) -> int:
        """Count the bytes that these adapters take in an empty arena."""
        end = 0
        for t in adapters:
            _, end = self._layout(t, end)
        return end * BYTES

    def _evict(self, adapters: Sequence[int]) -> None:
        for t in adapters:
            block = self._blocks.pop(t)
            if block.used is not None:
                self._evicted.append(block.used)
            if self._side is None:  # on a GPU kernels may still read it; no call asks for what is not in memory
                self._write_spans(t, [-1] * len(self.files[t].pieces), -1)

    # ------------------------------------------------------------------------------------------------------ reading

    def _load(self, t: int) -> None:
        """Copy adapter ``t`` from its file into its place."""
        file = self.files[t]
        with self._changed:
            block = self._blocks[t]
            waits, self._evicted = self._evicted, []
        with torch.inference_mode(False), torch.no_grad():
            if self._side is None:
                to = self.memory[block.start : block.end]
                self._copy(file, to, block)
            else:
                to = torch.empty(block.end - block.start, pin_memory=True)
                self._copy(file, to, block)
                with torch.cuda.stream(self._side):
                    for event in waits:
                        self._side.wait_event(event)
                    self.memory[block.start : block.end].copy_(to, non_blocking=True)
                    self._write_spans(t, block.starts)
                    block.loaded = torch.cuda.Event()
                    block.loaded.record(self._side)
        with self._changed:
            if self._side is None:
                self._write_spans(t, block.starts)
            block.ready = True
            self.loads += 1
            self._changed.notify_all()

    def _copy(self, file: AdapterFile, to: Tensor, block: Block) -> None:
        for start, (piece, a, b) in zip(block.starts, file.tensors(), strict=True):
            part = to[start - block.start :][: piece.floats]
            put(piece, a, b, part, self._widths.get(piece.layer))

    def _write_spans(self, t: int, starts: Sequence[int], rank: int | None = None) -> None:
        pieces = [(piece, start) for piece, start in zip(self.files[t].pieces, starts, strict=True)
                  if piece.layer in self._widths]  # fmt: skip
        rows = torch.tensor([self.layers[piece.layer] for piece, _ in pieces], dtype=torch.int64)
        if rank == -1:
            spans = torch.full((len(pieces), 2), -1, dtype=torch.int32)
        else:
            first = [start // self._widths[piece.layer] for piece, start in pieces]
            ends = [row + piece.rank for row, (piece, _) in zip(first, pieces, strict=True)]
            spans = torch.tensor([first, ends], dtype=torch.int32).t()
        if self._side is not None:
            rows, spans = (x.pin_memory().to(self.device, non_blocking=True) for x in (rows, spans))
        with torch.inference_mode(False):
            self.spans[rows, t] = spans

    def part(self, t: int, place: int) -> Tensor:
        """Return piece ``place`` of adapter ``t``, which this thread holds, as it lies in the arena."""
        start = self._blocks[t].starts[place]
        return self.memory[start : start + self.files[t].pieces[place].floats]

    # ---------------------------------------------------------------------------------------------- beside the calls

    def prefetch(self, wanted: Sequence[int]) -> None:
        """Read adapters ahead of the call that wants them, until there is no more room beside those of this list."""
        me = threading.get_ident()
        for t in wanted:
            with self._changed:
                if t in self._blocks:
                    self._blocks.move_to_end(t)
                    continue
                if self._place([t], keep=frozenset(wanted)) is None:
                    return
                block = self._blocks[t]
                block.users += 1
                self._holders[me] += 1
            try:
                self._load(t)
            except Exception:  # the call that wants it says what is wrong
                self._release([block], me, [t])
            else:
                self._release([block], me)

    def replace(self, t: int, file: AdapterFile) -> None:
        """Take a folder over that was read anew and has the layers and ranks it had."""
        with self._changed:
            while t in self._blocks and self._blocks[t].users:
                self._changed.wait()
            if t in self._blocks:
                self._evict([t])
            self.files[t] = file

    @property
    def resident(self) -> tuple[int, ...]:
        with self._changed:
            return tuple(t for t, block in self._blocks.items() if block.ready)


def put(piece: Piece, a: Tensor, b: Tensor, to: Tensor, width: int | None) -> None:
    """Write A and B into the flat ``to``: rows of both side by side in a linear layer, else one after the other."""
    if width is None:
        to[: a.numel()].view(a.shape).copy_(a)
        to[a.numel() :].view(b.shape).copy_(b)
        return
    rows = to.view(piece.rank, width)
    rows[:, : a.shape[1]].copy_(a)
    rows[:, a.shape[1] :].copy_(b.t())


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
