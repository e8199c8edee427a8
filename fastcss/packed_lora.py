"""Packs the T LoRA adapters of one layer: every rank as it is, nothing padded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PackedLora:
    """Holds T LoRA adapters of one linear layer, packed row by row.

    Adapter ``t`` owns the rows ``offsets[t]:offsets[t + 1]`` of ``a`` and ``b``. An adapter of rank 0 does not touch
    this layer. For inference, the rows may also lie anywhere in larger ``a`` and ``b``: adapter ``t`` then owns the
    rows ``offsets[t, 0]:offsets[t, 1]``, and one whose first row is -1 is not there and cannot be run.

    Attributes:
        a: ``[sum(ranks), K]``, the down projections, with one row per rank.
        b: ``[sum(ranks), N]``, the up projections *transposed*: row ``i`` is column ``i`` of PEFT's ``lora_B.weight``.
        ranks: the T true ranks.
        offsets: int32 ``[T + 1]`` on ``a.device``, the running sum of the ranks; or ``[T, 2]``, first row and end.
        scales: float32 ``[T]`` on ``a.device``, ``alpha / rank`` of each adapter.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    offsets: Tensor
    scales: Tensor

    @classmethod
    def pack(cls, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scales: Sequence[float] | Tensor) -> PackedLora:
        """Pack adapters given as PEFT keeps them. Gradients flow back to the given tensors.

        Args:
            lora_a: T tensors ``[r_t, K]``.
            lora_b: T tensors ``[N, r_t]``.
            scales: T factors, ``alpha / rank`` (or ``alpha / sqrt(rank)`` for rsLoRA); a sequence or a tensor ``[T]``.

        Raises:
            ValueError: no adapters, lengths that differ, or shapes that do not fit together.

        Example:
            >>> lora = PackedLora.pack([torch.randn(4, 8)], [torch.randn(16, 4)], [0.5])
            >>> lora.ranks, tuple(lora.a.shape), tuple(lora.b.shape)
            ((4,), (4, 8), (4, 16))
        """
        if not lora_a or not len(lora_a) == len(lora_b) == len(scales):
            raise ValueError(
                f"PackedLora.pack: wants as many lora_a as lora_b and scales, at least one; "
                f"got {len(lora_a)}, {len(lora_b)}, {len(scales)}"
            )
        width_in, width_out = lora_a[0].shape[-1], lora_b[0].shape[0]
        for t, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a.dim() != 2 or b.dim() != 2 or a.shape != (b.shape[1], width_in) or b.shape[0] != width_out:
                raise ValueError(
                    f"PackedLora.pack: adapter {t}: lora_a must be [r, {width_in}] and lora_b [{width_out}, r], "
                    f"got {list(a.shape)} and {list(b.shape)}"
                )
        ranks = tuple(a.shape[0] for a in lora_a)
        a = torch.cat(list(lora_a))
        b = torch.cat([b.t() for b in lora_b])
        starts = [sum(ranks[:t]) for t in range(len(ranks) + 1)]
        offsets = torch.tensor(starts, dtype=torch.int32, device=a.device)
        if not isinstance(scales, Tensor):
            scales = torch.tensor(scales, dtype=torch.float32, device=a.device)
        return cls(a, b, ranks, offsets, scales)

    @property
    def num_adapters(self) -> int:
        return len(self.ranks)

    # multi_lora asks for these in every call, which a thousand ranks would make slower by a tenth: they are kept then.
    @property
    def max_rank(self) -> int:
        return max(self.ranks) if _are_few(self.ranks) else _counted(self.ranks)[0]

    @property
    def total_rank(self) -> int:
        return sum(self.ranks) if _are_few(self.ranks) else _counted(self.ranks)[1]

    @property
    def has_sound_ranks(self) -> bool:
        """Tell whether ``ranks`` is a tuple of at least one whole number, none below 0."""
        ranks = self.ranks
        if not isinstance(ranks, tuple):
            return False
        return _are_sound(ranks) if _are_few(ranks) else _counted(ranks)[2]

    @property
    def has_spans(self) -> bool:
        """Tell whether the adapters' rows lie anywhere in ``a`` and ``b``."""
        return self.offsets.dim() == 2

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """Return the first row of each adapter and the row after its last, [T] each."""
        offsets = self.offsets
        return (offsets[:, 0], offsets[:, 1]) if self.has_spans else (offsets[:-1], offsets[1:])

    def padded(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``a`` as ``[T, max_rank, K]`` and ``b`` as ``[T, max_rank, N]``; zeros fill the lower ranks up.

        With ``index`` [S] only those of the adapters in it are copied, ``[S, max_rank, ·]``; -1 gives zeros.
        """
        T, R = self.num_adapters, self.max_rank
        if index is None and not self.has_spans and min(self.ranks) == R:
            return self.a.unflatten(0, (T, R)), self.b.unflatten(0, (T, R))
        start, end = self.spans if index is None else (bound[index] for bound in self.spans)
        row = start[:, None] + torch.arange(R, device=self.offsets.device)
        inside = row < end[:, None]
        if index is not None:
            inside = inside & (index >= 0)[:, None]
        row = torch.where(inside, row, 0)  # [T, R]
        return torch.where(inside[..., None], self.a[row], 0), torch.where(inside[..., None], self.b[row], 0)


def _are_few(ranks: tuple[int, ...]) -> bool:
    return len(ranks) < 64 or torch.compiler.is_compiling()


def _are_sound(ranks: tuple[int, ...]) -> bool:
    return bool(ranks) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)


@functools.lru_cache(maxsize=64)
def _counted(ranks: tuple[int, ...]) -> tuple[int, int, bool]:
    """Return the largest rank, their sum, and whether they are sound, without which the others mean nothing."""
    return (max(ranks), sum(ranks), True) if _are_sound(ranks) else (0, 0, False)
