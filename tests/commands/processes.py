"""Processes of the command line that are sent signals."""

from __future__ import annotations

import signal
import subprocess
import sys


def started(*arguments: str, **options) -> subprocess.Popen:
    """Start Python with these arguments. It hears Ctrl-C even if the tests run in a background that ignores it."""
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, **heard, **options)
