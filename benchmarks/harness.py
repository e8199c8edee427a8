"""Runs one case: verifies every provider, times those that are right, and makes the rows."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import limits, measure
from .cases import ENGINES, OURS, Case, NotInstalled, Problem, Step

ROOT = Path(__file__).parent.parent
#: Calls of so many milliseconds do not gain from what the call before left in the caches.
LONG_MS = 100.0


@dataclasses.dataclass
class Outcome:
    """Holds the rows of one case in one mode, and why a provider has none or was refused."""

    rows: list[dict]
    remarks: dict[str, str]


def run(
    case: Case, mode: str, device: str, malloc: str, seconds: float, providers: Collection[str] | None = None
) -> Outcome:
    """Verify every provider of ``case``, measure its memory, and time it for ``seconds`` on average.

    ``providers`` leaves all others out but ours.

    All cases together should take minutes, so a call that lasts seconds is made no more often than it must be: once to
    verify it, once for its memory, which also makes the heap as large as it needs, and then until
    ``measure.PATIENCE_MS`` to be timed. The first two are one and the same call for the oracle, if it is a provider's
    step, and for peers that compile and keep nothing.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    problem = case.build(device, mode)
    chosen = {n: p for n, p in problem.providers.items() if providers is None or n in {OURS, *providers}}
    oracle = measure.watched(problem.expected, device)
    firsts: dict[str, measure.Watched] = {}

    def first_call(name: str, step: Step) -> Sequence[Tensor]:
        if not _first_is_like_others(name, device):
            return step()
        seen = measure.watched(step, device)
        if seen.ms >= LONG_MS:
            firsts[name] = seen
        return seen.result

    steps, errors, remarks = verify(chosen, oracle.result, problem, first_call)
    unknown = [name for name in providers or () if name not in problem.providers]
    remarks |= dict.fromkeys(unknown, f"not run: the case has no such provider, but {', '.join(problem.providers)}")
    right = {name: step for name, step in steps.items() if errors[name] <= problem.tolerance}
    if device == "cuda":  # a CUDA graph of each provider shows the GPU's own time, besides what a caller waits
        graphs = {f"{name}+graph": functools.partial(problem.capture, name, step) for name, step in right.items()}
        graphs, graph_errors, graph_remarks = verify(graphs, oracle.result, problem)
        right |= {name: step for name, step in graphs.items() if graph_errors[name] <= problem.tolerance}
        errors, remarks = errors | graph_errors, remarks | graph_remarks
    peaks, before = {}, {}
    for name, step in right.items():
        seen = oracle if step is problem.expected else firsts.pop(name, None) or measure.watched(step, device)
        peaks[name] = seen.peak_mib
        if seen.ms >= LONG_MS:
            before[name] = seen.ms
        errors[name] = max(errors[name], problem.error(seen.result, oracle.result))
        if not errors[name] <= problem.tolerance:
            remarks[name] = f"refused: its error became {errors[name]:.2g} beside the others"
    right = {name: step for name, step in right.items() if errors[name] <= problem.tolerance}
    # --compare judges our rows by their spread, so ours are called three times in any case.
    times = measure.times_ms(right, device, seconds, before, thrice={OURS})
    best = limits.measured_limits(device, case.dtype).ms(problem.flops, problem.bytes)
    common = {"op": case.op, "case": case.name, "shape": case.shape, "mode": mode, "device": device}
    rows = []
    for name in errors:
        row = common | {"provider": name, "dtype": str(case.dtype).removeprefix("torch.")}
        peak = None if name in ENGINES else peaks.get(name)
        row |= _figures(times.get(name), peak, problem) | {"limit_ms": best}
        row |= {"error": errors[name], "verified": name in right, "malloc": malloc}
        rows.append(row | _stamp(case.sources, device))
    return Outcome(rows, remarks)


def _first_is_like_others(name: str, device: str) -> bool:
    """Tell whether a provider's first call holds no more memory than the next: it compiles and keeps nothing."""
    return device == "cpu" and OURS not in name and "compiled" not in name


def verify(
    providers: dict[str, Callable[[], Step]],
    expected: Sequence[Tensor],
    problem: Problem,
    first_call: Callable[[str, Step], Sequence[Tensor]] = lambda _, step: step(),
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """Prepare and run every provider once; return steps, errors, and a remark on each that did not run or was wrong."""
    steps, errors, remarks = {}, {}, {}
    for name, prepare in providers.items():
        try:
            step = prepare()
            got = expected if step is problem.expected else first_call(name, step)
        except NotInstalled as missing:
            remarks[name] = f"not installed: {missing}"
            continue
        except Exception as failure:
            lines = str(failure).strip().splitlines() or [""]
            remarks[name] = f"not run: {type(failure).__name__}: {lines[0]}"
            continue
        steps[name], errors[name] = step, problem.error(got, expected)
        if not errors[name] <= problem.tolerance:
            remarks[name] = f"refused: its error is {errors[name]:.2g}, allowed are {problem.tolerance:.2g}"
    return steps, errors, remarks


def _figures(samples: list[float] | None, peak: float | None, problem: Problem) -> dict:
    names = ("median_ms", "p20_ms", "p80_ms", "calls", "peak_mib", "gflops", "gbps")
    if not samples:
        return dict.fromkeys(names)
    # A single call has no quantiles: all three figures are its time.
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 2
    median = statistics.median(samples)
    rates = problem.flops / median / 1e6, problem.bytes / median / 1e6
    values = (median, p20, p80, len(samples), peak, *rates)
    return dict(zip(names, values, strict=True))


@functools.cache
def _stamp(sources: tuple[str, ...], device: str) -> dict:
    """Say what produced a row: versions, sources, date and device."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
        "source_sha": source_sha(sources),
        "date": datetime.date.today().isoformat(),
        "device_name": device_name(device),
    }


@functools.cache  # before the first row: a results file of this repository makes the tree dirty
def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_sha(patterns: Sequence[str]) -> str:
    """Hash the sources that a row stands on, every kernel among them; a row with another hash is stale."""
    files = {file for pattern in (*patterns, "kernels/*.py", "csrc/**/*") for file in ROOT.glob(pattern)}
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """Name the device: "NVIDIA H200", or "AMD EPYC 9654, AVX512, 2 threads" with the widest instructions in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(models, name).split(":")[-1].strip()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
