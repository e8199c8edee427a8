"""Tells by the values of tensors whether they have changed.

Neither the address nor torch's count of writes tells: ``.data.mul_()``, numpy and ``inference_mode`` write without
being counted, and what is freed and allocated again may lie at the same address.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dispatch import backends
from .._dispatch.private_apis import DisableTorchFunction
from .._schema import COMPILED  # noqa: F401  defines the op

_CHUNK = 1 << 16  # elements hashed at a time where torch's own calls do it, which need 16 bytes for each


class Contents:
    """The values of some tensors as they were when last asked; 8 bytes are kept of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._hashes: Tensor | None = None

    def changed(self, act: Callable[[int], None] | None = None) -> list[int]:
        """Places of the tensors whose values, shape or dtype differ from the last time; the first time of all.

        ``act`` is called with each place before the change counts as seen: another thread that asks meanwhile sees it
        too, and does not go on with what ``act`` is about to drop. Reads every byte: on a CPU at the speed of its
        memory, elsewhere the host waits for it.
        """
        if not self.tensors:
            return []
        hashes, before = fingerprints(self.tensors), self._hashes
        if before is None:
            places = list(range(len(self.tensors)))
        else:
            places = [] if torch.equal(hashes, before) else (hashes != before).nonzero()[:, 0].tolist()
        if act is not None:
            for place in places:
                act(place)
        self._hashes = hashes
        return places


def fingerprints(tensors: Sequence[Tensor]) -> Tensor:
    """int64 [n] on the CPU: a hash of each tensor's shape, dtype and bytes."""
    with torch.no_grad(), DisableTorchFunction():
        if backends.UNAVAILABLE["cpu"] is None and all(t.device.type == "cpu" for t in tensors):
            return torch.ops.fastcss.fingerprint.cpu(tensors)
        return torch.stack([_by_torch(t).cpu() for t in tensors])


def _by_torch(tensor: Tensor) -> Tensor:
    """The same with torch's calls, by another formula: Σ word · odd number of its place, modulo 2⁶⁴."""
    flat = tensor.detach().contiguous().flatten()
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64)
    flat = (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).view(words)
    total = torch.tensor(hash((tuple(tensor.shape), str(tensor.dtype))), device=flat.device)
    for part in flat.split(_CHUNK):
        total = total * 0x1E3779B185EBCA87 + (part.long() * _odd(flat.device)[: len(part)]).sum()
    return total


@functools.cache
def _odd(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(_CHUNK, device=device) * 0x3C6EF372FE94F82A + 1
