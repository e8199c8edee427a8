"""``python -m benchmarks.campaign [STAGE…] [--seconds S] [--out FOLDER]``: runs all that has to be found out on a GPU.

Each unit of a stage is a process of its own, since a kernel that faults spoils CUDA for its process. The results are
kept in out/gpu, and a second call goes on from there: it runs what was not run yet or was stopped, and, once the
sources have changed, what failed. A failure stops nothing; the exit code says whether there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CORES = os.cpu_count() or 1

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for stages that run as many processes as there are cores

Units = Mapping[str, Sequence[str]]  # name → command


class Stage(NamedTuple):
    """Describes a stage. ``units`` is called with the folder of what is kept and that of the rows, when it begins."""

    units: Callable[[Path, Path], Units]
    at_a_time: int = 1
    limit: float = 3600.0  # seconds, after which a unit is taken for hung


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def with_environment(command: Sequence[str], **variables: str) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command]


def build(kept: Path, rows: Path) -> Units:
    """Install the package, with its CUDA C++ if nvcc is there; without nvcc, CuPy compiles that at first use.

    If a kernel does not compile, the rest is installed all the same, so that the others can be looked at.
    """
    install = " ".join(python("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."))
    cuda = "FASTCSS_CUDA=1" if shutil.which("nvcc") else ""
    info = " ".join(python("-m", "fastcss", "info"))
    whole_or_not = f"{cuda} {install} && {info} || {{ FASTCSS_REQUIRE_COMPILED=0 {install}; {info}; exit 1; }}"
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]  # another one has nothing installed
    return {f"install {sha('csrc', 'setup.py', 'pyproject.toml')} on {machine}": ["sh", "-c", whole_or_not]}


def test(kept: Path, rows: Path) -> Units:
    workers = ("-n", max(CORES - 2, 1), "--dist", "worksteal", "--timeout", 300, "--timeout-method", "thread")
    tests = python("-m", "pytest", "tests", "-p", "gpu_run", "--kept", kept / "tests.jsonl", "--device", "cuda")
    return {"all": with_environment([*tests, "--tb", "short", *map(str, workers)], PYTHONPATH="tests", **ONE_THREAD)}


#: Each op has a test with these words in its name.
CHECKED = {"memcheck": "any_strides", "racecheck": "reproducible"}


def check(kept: Path, rows: Path) -> Units:
    """Run a few tests of every kernel under compute-sanitizer."""
    units = {}
    for tool, words in CHECKED.items():
        sanitizer = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
        for file in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
            if re.search(rf"def test_\w*{words}", file.read_text()):
                tests = python("-m", "pytest", file.relative_to(ROOT), "--device", "cuda")
                which = ["-k", f"{words} and (triton or cuda)", "--maxfail", "1"]
                # Each tensor gets its own memory, so that a read or write beyond it does not fall into another one.
                alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | ONE_THREAD
                units[f"{tool} {file.stem}"] = with_environment([*sanitizer, *tests, *which], **alone)
    return units


def of_each_case(command: Callable[[str], Sequence[str]]) -> Units:
    listing = python("-m", "benchmarks", "--device", "cuda", "--list")
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return {"list": listing}  # which then fails as a unit, and says why
    return {name: command(name) for name in listed.stdout.split()}


def verify(kept: Path, rows: Path) -> Units:
    """Run every provider once, many cases at a time, so that all is compiled by the time they are timed."""
    return of_each_case(lambda name: python("-m", "benchmarks.verify", name, "--device", "cuda"))


def tune(kept: Path, rows: Path) -> Units:
    return of_each_case(lambda name: python("-m", "benchmarks.tune", name, "--out", kept / "tiles.jsonl"))


def bench(kept: Path, rows: Path) -> Units:
    return of_each_case(
        lambda name: python("-m", "benchmarks", "--device", "cuda", "--case", name, "--out", f"{rows}/")
    )


SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")


def count(kept: Path, rows: Path) -> Units:
    """Read the hardware's counters over the kernels of each op's first case, to see what keeps one from its limit."""
    from fastcss._dispatch import backends

    ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all"]
    ncu += [word for section in SECTIONS for word in ("--section", section)]
    units = of_each_case(lambda name: with_environment([*ncu, *python("-m", "benchmarks.profile_kernels", name)]))
    first = {name.split("/")[0]: name for name in reversed(units)}.values()
    counted = ("list", *backends.KERNELS["triton"])
    return {name: units[name] for name in reversed(first) if name.split("/")[0] in counted}


STAGES = {
    "build": Stage(build),
    "test": Stage(test),
    "check": Stage(check, at_a_time=8, limit=500),
    "verify": Stage(verify, at_a_time=6, limit=500),
    "tune": Stage(tune, at_a_time=max(CORES - 2, 1), limit=500),
    "bench": Stage(bench, limit=500),
    "count": Stage(count, limit=500),
}


def sha(*paths: str) -> str:
    """Hash the code in these files and folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
        for file in files:
            if file.suffix in (".py", ".toml", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Run:
    """Holds a unit that runs, in a process group of its own; what it prints goes to a file."""

    def __init__(self, name: str, command: Sequence[str], printed: Path):
        self.name, self.printed, self.start = name, printed, time.monotonic()
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                list(command), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def stop(self) -> int:
        """Kill the unit, and return what a shell would: 128 + the signal's number."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return 128 + signal.SIGKILL


class Campaign:
    """Runs stages until ``deadline``, of time.monotonic().

    Args:
        kept: folder of what became of the units: campaign.jsonl, and campaign.log with all that they printed.
        rows: folder of the benchmarks' rows.
        out: folder that gets a copy of all that is kept.
    """

    def __init__(self, kept: Path, rows: Path, out: Path | None, deadline: float):
        self.kept, self.rows, self.out, self.deadline = kept, rows, out, deadline
        self.sources = sha("benchmarks", "csrc", "fastcss", "kernels", "tests")
        kept.mkdir(parents=True, exist_ok=True)
        self.file = kept / "campaign.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.ended = {row["unit"]: row for row in map(json.loads, lines)}

    def run(self, name: str, stage: Stage) -> bool:
        """Run a stage until it ends or the deadline comes, and tell whether all its units are done and were right."""
        units = {f"{name}/{unit}": command for unit, command in stage.units(self.kept, self.rows).items()}
        waiting, running = [unit for unit in units if not self.is_done(unit)], []
        print(f"{name}: {len(waiting)} of {len(units)} to run", flush=True)
        try:
            while (waiting or running) and time.monotonic() < self.deadline:
                while waiting and len(running) < stage.at_a_time:
                    unit = waiting.pop(0)
                    running.append(Run(unit, units[unit], self.kept / f".{os.getpid()}-{len(waiting)}"))
                for run in list(running):
                    code = run.process.poll()
                    if code is None and run.seconds > stage.limit:
                        code = run.stop()
                    if code is not None:
                        running.remove(run)
                        self.keep(run, code)
                self.copy_out()
                time.sleep(0.2)
        finally:
            for run in running:
                run.stop()
                self.log(run, "stopped, to be run again")
            self.copy_out()
        return self.summarise(name, list(units))

    def is_done(self, unit: str) -> bool:
        row = self.ended.get(unit)
        return row is not None and (row["rc"] == 0 or row["sources"] == self.sources)

    def keep(self, run: Run, code: int) -> None:
        row = {"unit": run.name, "rc": code, "seconds": round(run.seconds, 1), "sources": self.sources}
        self.ended[run.name] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log(run, f"exit code {code}")

    def log(self, run: Run, end: str) -> None:
        """Keep all that the unit printed, and print the end of it: two lines, or 15 if it failed."""
        text = run.printed.read_text(errors="replace")
        run.printed.unlink()
        title = f"{run.name}: {end}, {run.seconds:.0f} s"
        with (self.kept / "campaign.log").open("a") as file:
            file.write(f"=== {title}\n{text}\n")
        lines = text.rstrip().splitlines()[-(2 if end == "exit code 0" else 15) :]
        print(title, *(f"    {line[:200]}" for line in lines), sep="\n", flush=True)

    def copy_out(self) -> None:
        if self.out is None:
            return
        for file in self.kept.glob("[!.]*"):
            copy = self.out / file.name
            if not copy.exists() or copy.stat().st_mtime_ns < file.stat().st_mtime_ns:
                self.out.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)

    def summarise(self, name: str, units: list[str]) -> bool:
        ended = [self.ended[unit] for unit in units if unit in self.ended]
        failed = [row["unit"] for row in ended if row["rc"]]
        before = sum(row["sources"] != self.sources for row in ended)
        print(f"{name}: {len(ended)} of {len(units)} done, {len(failed)} failed", end="")
        print(f", {before} of them with other sources than these" if before else "")
        print(*(f"    failed: {unit}" for unit in failed), sep="\n", flush=True)
        return len(ended) == len(units) and not failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", help=f"some of the stages {' '.join(STAGES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; then call again")
    parser.add_argument("--out", type=Path, help="folder for a copy of all that is kept; rows go to out/gpu, too, then")
    options = parser.parse_args(arguments)
    for name in options.stage:
        if name not in STAGES:
            parser.error(f"no stage {name!r}; there are: {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs is stopped, and results are copied
    deadline = time.monotonic() + options.seconds
    kept = ROOT / "out" / "gpu"
    campaign = Campaign(kept, kept if options.out else ROOT / "benchmarks" / "results", options.out, deadline)
    right = [campaign.run(name, STAGES[name]) for name in options.stage or STAGES]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
