"""Code that a model compiles by itself runs as it is written while our modes watch the model's calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from .._dispatch.private_apis import dynamo_is_loaded

_lock = threading.Lock()
_inside = 0  # runs under way, in all threads: torch has one stance for them
_stance = None


@contextlib.contextmanager
def eager_parts() -> Iterator[None]:
    """Dynamo would trace the modes along with the model's code, which it cannot, or would freeze what they remember."""
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
