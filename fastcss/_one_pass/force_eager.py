"""Runs code that a model compiles by itself as plain Python while our modes watch the model's calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .._dispatch.private_apis import dynamo_is_loaded

_lock = threading.Lock()
_inside = 0  # runs under way in all threads, because torch has one stance for all of them
_stance = None


@contextlib.contextmanager
def eager_parts() -> Iterator[None]:
    """Switch compilation off inside this context.

    Dynamo would trace the modes along with the model's code. It cannot do that, or would freeze what they remember.
    """
    if not dynamo_is_loaded() or torch.compiler.is_compiling():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _stance
    with _lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1


def _leave() -> None:
    global _inside, _stance
    with _lock:
        _inside -= 1
        if not _inside:
            _stance.__exit__(None, None, None)
            _stance = None
