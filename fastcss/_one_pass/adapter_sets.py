"""Puts sets of adapters together: one set after the other, a selection of one, and one at other scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from .read_adapters import Adapters, LoraWeights


def joined(first: Adapters, second: Adapters) -> Adapters:
    """Return the adapters of ``first``, then those of ``second``."""
    lengths = len(first.names), len(second.names)
    return dataclasses.replace(
        first,
        names=(*first.names, *second.names),
        layers=_joined(first.layers, second.layers, *lengths),
        saved=_joined(first.saved, second.saved, *lengths),
        made_of=(*first.made_of, *second.made_of),
    )


def _joined(first: dict[str, list], second: dict[str, list], before: int, after: int) -> dict[str, list]:
    found = {name: [*own, *(second.get(name) or [None] * after)] for name, own in first.items()}
    return found | {name: [*[None] * before, *own] for name, own in second.items() if name not in first}


def selected(adapters: Adapters, names: Sequence[str], keep: bool = False) -> Adapters:
    """Return the adapters ``names`` in this order; layers that none of them covers stay only with ``keep``."""
    places = list(map(adapters.names.index, names))
    layers, saved = (
        {name: [own[place] for place in places] for name, own in held.items()}
        for held in (adapters.layers, adapters.saved)
    )
    if not keep:
        layers, saved = ({name: own for name, own in held.items() if _is_any(own)} for held in (layers, saved))
    return dataclasses.replace(adapters, names=tuple(names), layers=layers, saved=saved)


def _is_any(own: Sequence) -> bool:
    return any(each is not None for each in own)


def rescaled(adapters: Adapters, factors: Mapping[str, float]) -> Adapters:
    """Return the adapters with their scales multiplied by ``factors``, which are by name."""
    by_place = [factors.get(name, 1.0) for name in adapters.names]
    if all(factor == 1.0 for factor in by_place):
        return adapters
    layers = {name: list(map(_rescaled, own, by_place)) for name, own in adapters.layers.items()}
    return dataclasses.replace(adapters, layers=layers)


def _rescaled(weights: LoraWeights | None, factor: float) -> LoraWeights | None:
    if weights is None or factor == 1.0:
        return weights
    if not weights.taken_out:
        return dataclasses.replace(weights, scale=weights.scale * factor)
    # The part that PEFT has taken out of the base layer is no part of the adapter, and keeps its scale.
    own = weights.b.shape[1] - weights.taken_out
    b = torch.cat([weights.b[:, :own] * factor, weights.b[:, own:]], 1)
    return dataclasses.replace(weights, b=b, bias=None if weights.bias is None else weights.bias * factor)
