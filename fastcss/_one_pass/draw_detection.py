"""Finds out whether a call draws random numbers, by running it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._dispatch.private_apis import TorchDispatchMode, pytree

# These ops have torch's tag for drawing, but draw only if their plain arguments (dropout_p, training) ask for it.
_BY_ARGUMENT = (
    *("_scaled_dot_product", "_fused_sdp_choice", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
    *("_cudnn_rnn", "miopen_rnn", "_lstm_mps", "rrelu"),
)
_MOST_KNOWN = 10_000

_known: dict[tuple, bool] = {}  # the keys are function and plain arguments


def draws(func: Callable, args: tuple, kwargs: dict, leaves: list, structure: pytree.TreeSpec) -> tuple[object, bool]:
    """Return ``func(*args, **kwargs)`` and whether it drew; ``leaves`` and ``structure`` are those of its arguments.

    A call is watched the first time that a function gets these plain arguments. A list of names could not be complete,
    and whether ``dropout``, say, draws depends on its arguments.
    """
    signature = func, structure, tuple("" if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    drew = _known.get(signature)
    if drew is not None:
        return func(*args, **kwargs), drew
    generators = _generators()
    before = [generator.get_state() for generator in generators]
    with _Watch(certain=not generators) as watch:
        result = func(*args, **kwargs)
    moved = any(not torch.equal(b, g.get_state()) for b, g in zip(before, generators, strict=True))
    drew = watch.drew or moved
    empty = any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in leaves)
    if generators and (drew or not empty):  # a call on empty tensors draws nothing, and so tells nothing
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[signature] = drew
    return result, drew


def _generators() -> list[torch.Generator]:
    """Return the generators that a call without its own generator draws from; none while they cannot be read."""
    if torch.compiler.is_compiling():
        return []
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return [torch.default_generator]
    return [] if torch.cuda.is_current_stream_capturing() else [torch.default_generator, *torch.cuda.default_generators]


class _Watch(TorchDispatchMode):
    """Sees the ops of a call that torch has tagged as drawing; ``certain`` also counts ops that may not have drawn."""

    def __init__(self, certain: bool) -> None:
        super().__init__()
        self.drew, self._certain = False, certain

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drew |= self._certain or not func._schema.name.removeprefix("aten::").startswith(_BY_ARGUMENT)
        return func(*args, **(kwargs or {}))
