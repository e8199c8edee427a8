"""Measures the time and the memory of one call."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

MIB = 1 << 20
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler below would print two lines at every use


def give_memory_back(above: float = 0.25) -> None:
    """Give free memory back to the system, if the process holds more than this part of the machine's memory.

    Nothing else does that after ``tune_malloc``, and pieces of every case add up. It is not done more often because the
    next case then has its page faults again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        if resident > above * os.sysconf("SC_PHYS_PAGES"):
            gc.collect()
            libc.malloc_trim(ctypes.c_size_t(0))


#: All providers are called in at least so many rounds; one whose calls took so long in sum sits out the rest.
ROUNDS, PATIENCE_MS = 5, 2500.0
#: A call that takes more than so many times as long as the one before met a slow moment, such as a gigabyte's faults.
FAR = 1.25


def times_ms(
    steps: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    before: Mapping[str, float] = MappingProxyType({}),
    thrice: Container[str] = (),
) -> dict[str, list[float]]:
    """Time the calls of all providers in turn (A B A B …), in milliseconds: a slow moment of the machine hits them all.

    Args:
        steps: name → what to call; each has run before.
        device: "cpu" or "cuda".
        seconds: time to spend on each provider on average; there are ROUNDS in any case.
        before: how long the last call took, for those that need no untimed call before the first that is timed.
        thrice: names that are called at least three times, however long that takes. So is a provider whose first time
            is far from that of the call before it.
    """
    time_once = _cuda_ms if device == "cuda" else _cpu_ms
    samples = {name: [] for name in steps}
    for name, step in steps.items():
        if name not in before:  # the profiler leaves the caches cold for the first call, unlike for the later ones
            step()
    end = time.perf_counter() + seconds * len(steps)
    for rounds in itertools.count():
        due = [
            name
            for name, times in samples.items()
            if sum(times) < PATIENCE_MS
            or (len(times) < 3 and (name in thrice or times[0] > FAR * before.get(name, times[0])))
        ]
        if not due or (rounds >= ROUNDS and time.perf_counter() >= end):
            return samples
        for name in due:
            samples[name].append(time_once(steps[name]))


def _cpu_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(step: Callable[[], object]) -> float:
    """Time a call on an idle GPU with a cold L2 cache: what a caller in a larger program waits, launches included."""
    flush = _flush_buffer()
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


_FLUSH: dict[int, torch.Tensor] = {}


def _flush_buffer() -> torch.Tensor:
    index = torch.cuda.current_device()
    if index not in _FLUSH:
        size = 2 * torch.cuda.get_device_properties(index).L2_cache_size
        _FLUSH[index] = torch.empty(size, dtype=torch.int8, device="cuda")
    return _FLUSH[index]


def captured(step: Callable[[], object], constants: AbstractContextManager | None = None) -> Callable[[], object]:
    """Capture ``step`` as a CUDA graph, whose time is the device's alone; raises if it cannot be captured.

    The first calls may keep results in ``constants`` for the captured one, such as those that no graph can hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with constants or contextlib.nullcontext():
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = step()
    held = outputs, constants  # the graph reads what was kept

    def replay():
        graph.replay()
        return held[0]

    return replay


@dataclasses.dataclass
class Watched:
    """Holds of one call its result, the most memory it held, and how long it took, the profiler's share included."""

    result: Sequence[Tensor]
    peak_mib: float
    ms: float


def watched(step: Callable[[], Sequence[Tensor]], device: str) -> Watched:
    """Call ``step`` and record the most memory it holds at a time beyond what was there before; its result counts,
    kept state does not.

    The figure on a CPU comes from the profiler's record of torch's allocator. That sees temporaries inside compiled ops
    too, but not the workspace that our C++ ops keep for each thread, which is state like any other.
    """
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Watched(result, peak / MIB, (time.perf_counter() - start) * 1e3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
        ms = (time.perf_counter() - start) * 1e3
    peak = max(itertools.accumulate(allocations(profile), initial=0))
    return Watched(result, peak / MIB, ms)


def allocations(profile: torch.profiler.profile) -> list[int]:
    """List the bytes that torch took on CPU and (negative) gave back, in order, without blocks older than ``profile``.

    The profiler does report the end of an older block if an earlier profile saw one at its address, with the size of
    that one.
    """
    pending, seen = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            seen.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    taken, sizes = set(), []
    for _, address, size in sorted(seen, key=lambda event: event[0]):
        if size > 0:
            taken.add(address)
        elif address in taken:
            taken.remove(address)
        else:
            continue
        sizes.append(size)
    return sizes


def peak_mib(step: Callable[[], object], device: str) -> float:
    """Measure the most memory that one call holds at a time, as ``watched`` records it."""
    return watched(step, device).peak_mib
