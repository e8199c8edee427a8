"""``python children.py KIND``: every op in this process, on its threads, and then in children of KIND, to the same
bits. Ends with an error where a child gives others, or does not end."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[up] / room) for up, room in ((1, ""), (1, "ops"), (2, ""))]

import numpy as np
import torch
from op_calls import OPS, example
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Results = dict[str, Tensor]


class Calls(Dataset):
    """Each op's results. What they are of is made on one thread: torch starts all of them for the smallest tensor."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.calls = {op: example(op) for op in OPS}
        self.gradients = {op: call.output_gradients() for op, call in self.calls.items()}

    def forward(self, op: str) -> Results:
        with torch.no_grad():
            return self.calls[op].outputs("cpu")

    def forward_and_backward(self, op: str) -> Results:
        return self.calls[op].leaves().results("cpu", self.gradients[op])

    def __len__(self) -> int:
        return len(OPS)

    def __getitem__(self, i: int) -> Results:
        return self.forward_and_backward(list(OPS)[i])


def assert_same(op: str, got: Results, want: Results) -> None:
    for name in got:  # by NumPy: torch's own comparison may want threads, which a forked process does not have
        assert np.array_equal(got[name].numpy(), want[name].numpy()), (op, name)


def in_a_fork(calls: Calls, want: dict[str, Results]) -> None:
    """The ops as they are, then with their gradients, as torch itself wants it in a fork: on one thread."""
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        for op in OPS:
            assert_same(op, calls.forward(op), want[op])
        torch.set_num_threads(1)
        for op in OPS:
            assert_same(op, calls.forward_and_backward(op), want[op])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def in_workers(calls: Calls, want: dict[str, Results], kind: str) -> None:
    loader = DataLoader(calls, batch_size=None, num_workers=1, multiprocessing_context=kind, timeout=100)
    for op, got in zip(OPS, loader, strict=True):
        assert_same(op, got, want[op])


if __name__ == "__main__":
    calls = Calls()
    torch.set_num_threads(2)
    want = {op: calls.forward_and_backward(op) for op in OPS}
    if sys.argv[1] == "os.fork":
        in_a_fork(calls, want)
    else:
        in_workers(calls, want, sys.argv[1])
