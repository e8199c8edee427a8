"""Makes processes that kill themselves half-way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def killing(calls: int) -> Callable[[Callable], Callable]:
    """Return a decorator: its functions together may be called so often, and the next call kills the process."""

    def dying(function: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal calls
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            calls -= 1
            return function(*args, **kwargs)

        return call

    return dying
