"""Holds the adapters of a pool that are in memory: one allocation, in which each takes a block and gives it back.

This is the unified paging of S-LoRA (Sheng et al. 2023, §5): adapters of any ranks, of all layers, share one arena, and
a layer's kernel reads rows of it where they lie. Row i of a linear layer's adapter is row i of A followed by row i of
Bᵀ, so the arena seen as [rows, K + N] is the A of that layer in its first K columns and the Bᵀ in the others.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .pool_files import POOL, AdapterFile, Piece
from .pool_places import Block, Places

BYTES = 4  # of float32, in which PEFT runs the adapters it loads


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
        self._changed = threading.Condition()
        self._holders: collections.Counter[int] = collections.Counter()  # threads, by how many calls they are in
        self._held = threading.local()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unread: list[torch.cuda.Event] = []  # after the last calls that read what was evicted since the last copy
        self._places = Places(self.files, widths, budget // BYTES, self._evicted_from)
        largest = max(range(len(self.files)), key=self._places.most.__getitem__)
        if self.bytes_of([largest]) > budget:
            raise ValueError(
                f"{POOL}: budget is {_mib(budget)}, and adapter {self.files[largest].name!r} alone takes "
                f"{_mib(self.bytes_of([largest]))} ({self.bytes_of([largest]):,} bytes)"
            )
        size = self._places.size
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
        places = self._places
        if sum(places.most[t] for t in wanted) > places.size and places.end_of(wanted) > places.size:
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

    def bytes_of(self, adapters: Sequence[int]) -> int:
        """Count the bytes that these adapters take in an empty arena."""
        return self._places.end_of(adapters) * BYTES

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
            placed = self._places.take(wanted, keep=frozenset(wanted))
            if placed is None and not any(block.users for block in self._places.blocks.values()):
                # What lay between the blocks was too small: they fit from the start.
                self._places.evict(list(self._places.blocks))
                placed = self._places.take(wanted, keep=frozenset())
            if placed is not None:
                blocks = [self._places.blocks[t] for t in wanted]
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
                if not self._places.blocks[t].ready:
                    self._places.blocks[t].failed = True
                    self._places.evict([t])
            self._holders[me] -= 1
            self._changed.notify_all()

    def _evicted_from(self, t: int, block: Block) -> None:
        if block.used is not None:
            self._unread.append(block.used)
        if self._side is None:  # on a GPU kernels may still read it; no call asks for what is not in memory
            self._write_spans(t, None)

    # ------------------------------------------------------------------------------------------------------ reading

    def _load(self, t: int) -> None:
        """Copy adapter ``t`` from its file into its place."""
        file = self.files[t]
        with self._changed:
            block = self._places.blocks[t]
            waits, self._unread = self._unread, []
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

    def _write_spans(self, t: int, starts: Sequence[int] | None) -> None:
        """Write where the rows of adapter ``t`` are in each linear layer; None says that it is not in memory."""
        linear = [(place, piece) for place, piece in enumerate(self.files[t].pieces) if piece.layer in self._widths]
        rows = torch.tensor([self.layers[piece.layer] for _, piece in linear], dtype=torch.int64)
        if starts is None:
            spans = torch.full((len(linear), 2), -1, dtype=torch.int32)
        else:
            first = [starts[place] // self._widths[piece.layer] for place, piece in linear]
            ends = [row + piece.rank for row, (_, piece) in zip(first, linear, strict=True)]
            spans = torch.tensor([first, ends], dtype=torch.int32).t()
        if self._side is not None:
            rows, spans = (x.pin_memory().to(self.device, non_blocking=True) for x in (rows, spans))
        with torch.inference_mode(False):
            self.spans[rows, t] = spans

    def part(self, t: int, place: int) -> Tensor:
        """Return piece ``place`` of adapter ``t``, which this thread holds, as it lies in the arena."""
        start = self._places.blocks[t].starts[place]
        return self.memory[start : start + self.files[t].pieces[place].floats]

    # ---------------------------------------------------------------------------------------------- beside the calls

    def prefetch(self, wanted: Sequence[int]) -> None:
        """Read adapters ahead of the call that wants them, until there is no more room beside those of this list."""
        me = threading.get_ident()
        for t in wanted:
            with self._changed:
                if t in self._places.blocks:
                    self._places.blocks.move_to_end(t)
                    continue
                if self._places.take([t], keep=frozenset(wanted)) is None:
                    return
                block = self._places.blocks[t]
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
            while t in self._places.blocks and self._places.blocks[t].users:
                self._changed.wait()
            if t in self._places.blocks:
                self._places.evict([t])
            self.files[t] = file

    @property
    def resident(self) -> tuple[int, ...]:
        with self._changed:
            return tuple(t for t, block in self._places.blocks.items() if block.ready)


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
