"""``python refused_memory.py``: ops that are refused memory end with an error, and then work as before.

By a limit of the process, in ``multi_lora``; and where failing_malloc.c is preloaded, by each of its larger allocations
in turn, in every op, forward and backward, and in ``mlp``, which only ``fuse`` calls. Ends with an error where a call
gives other bits afterwards.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[up] / room) for up, room in ((1, ""), (1, "ops"), (2, ""))]

import test_mlp
import torch
from op_calls import OPS, example
from torch import Tensor

from fastcss import PackedLora, multi_lora

LEAST = 4000  # bytes: torch does not survive the loss of some of its own small allocations


#: Computes an op's results and gradients, of inputs that are there already.
Prepared = Callable[[], dict[str, Tensor]]


def mlp(dtype: torch.dtype) -> Prepared:
    given = test_mlp.operands(70, 40, 1100, dtype=dtype)
    return lambda: {"y": test_mlp.kernel(*given)}


def prepare(op: str) -> Prepared:
    leaves = example(op).leaves()
    gradients = GRADIENTS.setdefault(op, leaves.output_gradients())
    return lambda: leaves.results("cpu", gradients)


GRADIENTS: dict[str, tuple[Tensor, ...]] = {}
CALLS = {op: partial(prepare, op) for op in OPS} | {f"mlp of {dtype}": partial(mlp, dtype) for dtype in test_mlp.DTYPES}


def assert_as_before(op: str, want: dict[str, Tensor]) -> None:
    got = CALLS[op]()()
    assert all(torch.equal(got[name], want[name]) for name in want), op


def by_a_limit() -> None:
    """A weight that takes 256 MiB when it is packed, and no memory as it is given."""
    op, size, zero = "multi_lora", 8192, torch.zeros(1, 1)
    want = prepare(op)()
    lora = PackedLora.pack([torch.zeros(4, size)], [torch.zeros(size, 4)], [1.0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20), limits[1]))
    try:
        multi_lora(zero.expand(400, size), zero.expand(size, size), lora, impl="cpu")
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        return assert_as_before(op, want)
    raise AssertionError("no memory was refused")


def by_turns(refuse: Callable[[int, int], None]) -> None:
    """Refuse each allocation of an op in turn, each time in a new thread, which has no workspaces yet."""
    for op, prepare_op in CALLS.items():
        want, refused = prepare_op()(), []

        def call(op=op, prepare_op=prepare_op, want=want, refused=refused) -> None:
            torch.set_num_threads(2)
            prepare("top_margin")()  # what a thread allocates for itself, once
            compute, error = prepare_op(), None
            refuse(len(refused) + 1, LEAST)
            try:
                compute()
            except (MemoryError, RuntimeError) as caught:  # torch's is a RuntimeError, for a tensor
                error = caught
            refuse(0, 0)
            assert_as_before(op, want)
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
