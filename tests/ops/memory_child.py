"""Measures the memory of a call, in a process that is there for this (``checks.extra_memory``)."""

from __future__ import annotations

_PROGRAM = """
import torch
from fastcss import ops

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

torch.manual_seed(0)
{prepare}
def run({arguments}):
    {run}
run({small})
before = status("VmRSS")
kept = run({large})
extra = status("VmHWM") - before - sum(t.nbytes for t in kept)
"""


def extra_memory(**parts: str) -> int:
    """Most bytes held during the second call, of what is ``large``, beyond its inputs and results."""
    names = {}
    exec(_PROGRAM.format(**parts), names)
    return names["extra"]
