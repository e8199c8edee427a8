"""Keeps the adapters of a runner as they are while one of its calls is under way, in whatever thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_NOTHING = contextlib.nullcontext()


class Calls:
    """Lets the calls of a runner run side by side, and changes of its adapters only between them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._under_way, self._is_changing = 0, False
        self._of_thread = threading.local()
        self._call = _Call(self)

    def call(self) -> contextlib.AbstractContextManager:
        """Return a context for one call; a call inside of another does not wait."""
        return _NOTHING if torch.compiler.is_compiling() else self._call

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the calls under way, and hold up those that come meanwhile."""
        if self._depth():
            raise RuntimeError("one_pass: the adapters cannot change inside of a call of their runner (in a hook, say)")
        with self._condition:
            self._condition.wait_for(lambda: not self._is_changing)
            self._is_changing = True
        try:
            with self._condition:
                self._condition.wait_for(lambda: not self._under_way)
            yield
        finally:
            with self._condition:
                self._is_changing = False
                self._condition.notify_all()

    def _depth(self) -> int:
        return getattr(self._of_thread, "depth", 0)

    def _begin(self) -> None:
        depth = self._depth()
        if not depth:
            with self._condition:
                while self._is_changing:
                    self._condition.wait()
                self._under_way += 1
        self._of_thread.depth = depth + 1

    def _end(self) -> None:
        self._of_thread.depth = depth = self._depth() - 1
        if not depth:
            with self._condition:
                self._under_way -= 1
                if self._is_changing:
                    self._condition.notify_all()


class _Call:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        self._calls._begin()

    def __exit__(self, *error: object) -> None:
        self._calls._end()
