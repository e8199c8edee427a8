"""``python refused_memory.py``: ops that are refused memory end with an error, and then work as before.

By a limit of the process, in ``multi_lora``; and where failing_malloc.c is preloaded, in every op, forward and
backward, by each of its larger allocations in turn. Ends with an error where a call gives other bits afterwards.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[up] / room) for up, room in ((1, ""), (1, "ops"), (2, ""))]

import torch
from op_calls import OPS, example
from torch import Tensor

from fastcss import PackedLora, multi_lora

LEAST = 4000  # bytes: torch does not survive the loss of some of its own small allocations


def assert_as_before(op: str, gradients: tuple[Tensor, ...], want: dict[str, Tensor]) -> None:
    got = example(op).leaves().results("cpu", gradients)
    assert all(torch.equal(got[name], want[name]) for name in want), op


def by_a_limit() -> None:
    """A weight that takes 256 MiB when it is packed, and no memory as it is given."""
    op, size, zero = "multi_lora", 8192, torch.zeros(1, 1)
    gradients = example(op).output_gradients()
    want = example(op).leaves().results("cpu", gradients)
    lora = PackedLora.pack([torch.zeros(4, size)], [torch.zeros(size, 4)], [1.0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), limits[1]))
    try:
        multi_lora(zero.expand(400, size), zero.expand(size, size), lora, impl="cpu")
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        return assert_as_before(op, gradients, want)
    raise AssertionError("no memory was refused")


def by_turns(refuse: Callable[[int, int], None]) -> None:
    """Refuse each allocation of an op in turn, each time in a new thread, which has no workspaces yet."""
    warm = example("top_margin")
    warm_gradients = warm.output_gradients()
    for op in OPS:
        gradients = example(op).output_gradients()
        want, refused = example(op).leaves().results("cpu", gradients), []

        def call(op=op, gradients=gradients, want=want, refused=refused) -> None:
            torch.set_num_threads(2)
            warm.leaves().results("cpu", warm_gradients)  # what a thread allocates for itself, once
            leaves, error = example(op).leaves(), None
            refuse(len(refused) + 1, LEAST)
            try:
                leaves.results("cpu", gradients)
            except (MemoryError, RuntimeError) as caught:  # torch's is a RuntimeError, for a tensor
                error = caught
            refuse(0, 0)
            assert_as_before(op, gradients, want)
            refused.append(error)

        while not refused or refused[-1]:
            count, thread = len(refused), Thread(target=call)
            thread.start()
            thread.join()
            assert len(refused) == count + 1, f"{op} does not work any more"
        print(op, len(refused) - 1)
        assert len(refused) > 1, f"{op} was refused nothing"


if __name__ == "__main__":
    torch.set_num_threads(2)
    by_a_limit()
    process = ctypes.CDLL(None)
    if hasattr(process, "refuse"):
        process.refuse.argtypes = (ctypes.c_long, ctypes.c_size_t)
        by_turns(process.refuse)
