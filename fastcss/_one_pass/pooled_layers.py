"""Runs adapted layers whose adapters lie in a pool's arena, each call with those that it holds there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..packed_lora import PackedLora
from .adapted_conv2d import AdaptedConv2d, PackedConv2d
from .adapted_kinds import AdaptedEmbedding, AdaptedLinear, PackedLinear
from .adapted_layer import Adapted, Slots
from .pool_arena import Arena
from .read_adapters import LoraWeights, kind_of


class Paged(Sequence):
    """Stands for one layer's adapters in a pool: each as it lies in the arena while a call holds it.

    It iterates over none, since none of their tensors is there for long: what a runner watches for changes in values
    are an adapter's files here.
    """

    def __init__(self, arena: Arena, layer: str) -> None:
        self.arena, self.layer = arena, layer
        self.places = [
            next((i for i, piece in enumerate(file.pieces) if piece.layer == layer), None) for file in arena.files
        ]
        pieces = [
            None if place is None else file.pieces[place] for place, file in zip(self.places, arena.files, strict=True)
        ]
        self.ranks = tuple(0 if piece is None else piece.rank for piece in pieces)
        self.scales = tuple(0.0 if piece is None else piece.scale for piece in pieces)
        self.max_rank = max(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[LoraWeights | None]:
        return iter(())

    def __getitem__(self, t: int) -> LoraWeights | None:
        place = self.places[t]
        if place is None:
            return None
        piece, flat = self.arena.files[t].pieces[place], self.arena.part(t, place)
        count = flat.numel() - math.prod(piece.b.shape)
        return LoraWeights(flat[:count].view(piece.a.shape), flat[count:].view(piece.b.shape), piece.scale)

    def over(self, base: nn.Module, slots: Slots) -> Adapted:
        """Make the layer that replaces ``base``."""
        kinds = {"linear": PooledLinear, "conv2d": PooledConv2d, "embedding": PooledEmbedding}
        return kinds[kind_of(base)](base, self, slots)


@dataclasses.dataclass(frozen=True)
class PooledLora(PackedLora):
    """Packs all adapters of a pool, wherever they lie in its arena; made once, so it knows what else is counted."""

    largest: int

    @property
    def max_rank(self) -> int:
        return self.largest

    @property
    def has_sound_ranks(self) -> bool:
        return True


class _Pooled(Adapted):
    """Has adapters that a call holds in the arena, and no packs of its own."""

    def __init__(self, base_layer: nn.Module, paged: Paged, slots: Slots) -> None:
        super().__init__(base_layer, (), slots)
        self.adapters = paged

    def _covered(self, tasks: tuple[int, ...]) -> bool:
        return any(self.adapters.ranks[t] for t in tasks)

    def tensors(self, tasks: tuple[int, ...] | None = None) -> list[Tensor]:
        return []

    def _dropout(self, tasks: tuple[int, ...]) -> None:
        return None  # a pool runs in eval mode only

    def packed(self, tasks: tuple[int, ...]):
        return self.pack(tasks)

    def _held(self) -> tuple[int, ...]:
        """Return the adapters of this call that cover the layer."""
        return tuple(t for t in self.adapters.arena.held if self.adapters.ranks[t])

    def extra_repr(self) -> str:
        return f"adapters={len(self.adapters)}, ranks to {self.adapters.max_rank}"


class PooledLinear(_Pooled, AdaptedLinear):
    """Runs a linear layer on rows of the arena: nothing is copied for a call."""

    def __init__(self, base_layer: nn.Module, paged: Paged, slots: Slots) -> None:
        super().__init__(base_layer, paged, slots)
        arena, (width_out, width_in) = paged.arena, self._weight.shape
        number, width = arena.layers[paged.layer], width_in + width_out
        rows = arena.memory[: arena.memory.numel() // width * width].view(-1, width)
        with torch.inference_mode(False):
            scales = torch.tensor(paged.scales, device=arena.device)
        self._lora = PooledLora(
            rows[:, :width_in], rows[:, width_in:], paged.ranks, arena.spans[number], scales, paged.max_rank
        )

    def _all(self) -> tuple[int, ...]:
        return ()

    def pack(self, tasks: tuple[int, ...]) -> PackedLinear:
        """Return the pack of one adapter; of all, which ``_all`` says by naming none."""
        lora = self._lora
        if tasks:
            (t,) = tasks
            lora = PackedLora(lora.a, lora.b, lora.ranks[t : t + 1], lora.offsets[t : t + 1], lora.scales[t : t + 1])
        return PackedLinear(lora, None)


class PooledConv2d(_Pooled, AdaptedConv2d):
    """Runs a convolution; the adapters of a call are stacked for it, at the pool's largest rank of this layer."""

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        held = self._held()
        if not held:
            return self.base(x)
        known = torch.tensor(held, device=index.device)
        place = torch.searchsorted(known, index).clamp(max=len(held) - 1)
        # Not covered, and -1, are the zeros after the last.
        place = torch.where(known[place] == index, place, len(held))
        return self._each(x, self.pack(held).of(place), None, index)

    def pack(self, tasks: tuple[int, ...]) -> PackedConv2d:
        pack = super().pack(tasks)
        # The shape does not depend on which adapters a call has, and so neither does the order of sums.
        missing = self.adapters.max_rank - pack.a.shape[1]
        a, b = F.pad(pack.a, (0, 0) * 3 + (0, missing)), F.pad(pack.b, (0, missing))
        return dataclasses.replace(pack, a=a, b=b)


class PooledEmbedding(_Pooled, AdaptedEmbedding):
    """Runs an embedding on the tables of the call's adapters."""

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        base, held = self.base_layer(x), self._held()
        packed = dict(zip(held, self.pack(held) if held else (), strict=True))
        return torch.stack([self._add(base[s], x[s], packed.get(t)) for s, t in enumerate(index.tolist())])
