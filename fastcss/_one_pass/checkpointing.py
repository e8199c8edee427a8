"""Supports gradient checkpointing while adapters run in turn: each layer is recomputed with its own adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import nn

from .._dispatch.private_apis import CHECKPOINT_FUNCTION
from .adapted_layer import Slots


def bind_checkpoints(model: nn.Module, slots: Slots) -> None:
    """Make the modules of ``model`` recompute in the backward pass what they computed in the forward pass."""
    for module in model.modules():
        checkpoint = vars(module).get(CHECKPOINT_FUNCTION)
        if checkpoint is not None and not isinstance(checkpoint, _Bound):
            vars(module)[CHECKPOINT_FUNCTION] = _Bound(checkpoint, slots)


class _Bound:
    """Wraps ``checkpoint`` for functions that depend on the task of the present pass."""

    def __init__(self, checkpoint: Callable, slots: Slots) -> None:
        self._checkpoint, self._slots = checkpoint, slots

    def __call__(self, function: Callable, *args, **kwargs) -> object:
        tasks, rules, again = self._slots.tasks, self._slots.rules, False

        def run(*args, **kwargs):
            nonlocal again
            with contextlib.ExitStack() as stack:
                if again:  # this is the backward pass, which may run in another thread
                    stack.enter_context(rules)
                    stack.enter_context(self._slots.hold(tasks=tasks, rules=rules))
                again = True
                return function(*args, **kwargs)

        return self._checkpoint(run, *args, **kwargs)
