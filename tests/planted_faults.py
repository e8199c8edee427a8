"""``python tests/planted_faults.py``: plants faults, one at a time, and says which test finds each.

The faults stand in ``tests/faults``: small wrong changes in all rooms, each with the tests that have to fail by it. A
fault is planted in a copy of the tree, never in the tree itself. Exit code 1: one was not found, or has no place to
stand in any more. A change of the suite that loses a fault makes the suite worse, however much faster it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from faults.adapters import ADAPTERS
from faults.fault import Fault
from faults.fuse import FUSE
from faults.kernels import CPU, CUDA, TRITON
from faults.one_pass import ONE_PASS
from faults.ops import OPS
from faults.systems import BENCHMARKS, COMMANDS, DATA, MODELS, NN

FAULTS = [*CPU, *TRITON, *CUDA, *OPS, *ONE_PASS, *ADAPTERS, *FUSE, *NN, *MODELS, *DATA, *COMMANDS, *BENCHMARKS]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "out", "dist", ".pytest_cache", ".hypothesis")
#: Installed packages lie in folders of other names than they have in the tree.
LINKS = {"fastcss/kernels": "../kernels", "fastcss/cuda": "../csrc/cuda"}
SECONDS = 600  # after which a test counts as caught by hanging


class Found(NamedTuple):
    """Records what came of a planted fault: the test that failed by it, and whether one did."""

    by: str
    caught: bool
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/planted_faults.py", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help="faults whose name has this in it (default: all)")
    parser.add_argument(
        "--tree", type=Path, default=Path(__file__).parents[1], help="another checkout to plant them in"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the copy, kept for the next time (default: a new one)")
    parser.add_argument("--list", action="store_true", help="only say whether each has its place, and run nothing")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if any(part in fault.name for part in options.name or [""])]
    if not faults:
        parser.error(f"no fault has {' or '.join(options.name)} in its name")
    lost = [f"{fault.name}: {reason}" for fault in faults if (reason := why_not(options.tree, fault))]
    print(*lost, sep="\n", end="\n" if lost else "")
    if options.list:
        return report_list(faults, lost)
    with tempfile.TemporaryDirectory() as temporary:
        tree = copied(options.tree.resolve(), options.scratch or Path(temporary) / "tree")
        faults = [fault for fault in faults if not why_not(tree, fault)]
        width, missed = max(len(fault.name) for fault in faults), 0
        preload()
        print(f"{'fault':{width}}  {'file':40}  caught by, seconds", flush=True)
        for fault in faults:
            found = plant(tree, fault)
            missed += not found.caught
            print(f"{fault.name:{width}}  {fault.file:40}  {found.by}  {found.seconds:.0f}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} caught, {len(lost)} without a place")
    return 1 if missed or lost else 0


def report_list(faults: list[Fault], lost: list[str]) -> int:
    print(f"{len(faults) - len(lost)} of {len(faults)} faults have their place")
    return 1 if lost else 0


def why_not(tree: Path, fault: Fault) -> str | None:
    """Why the fault cannot be planted: its place is no more what it was, and wants another text."""
    path = tree / fault.file
    if not path.is_file():
        return f"there is no {fault.file}"
    count = path.read_text().count(fault.old)
    return None if count == 1 else f"its text stands {count} times in {fault.file}"


def copied(tree: Path, scratch: Path) -> Path:
    """The tree in a folder of its own, with its compiled module as it is."""
    for link in LINKS:
        (scratch / link).unlink(missing_ok=True)
    shutil.copytree(tree, scratch, ignore=LEFT_OUT, dirs_exist_ok=True, symlinks=True, copy_function=copy_changed)
    for link, target in LINKS.items():
        if not (scratch / link).is_symlink():
            (scratch / link).symlink_to(target)
    return scratch.resolve()


def copy_changed(source: str, target: str) -> None:
    """A file that is there already keeps its time: what was compiled of it serves again."""
    if not Path(target).exists() or Path(source).read_bytes() != Path(target).read_bytes():
        shutil.copy(source, target)


def plant(tree: Path, fault: Fault) -> Found:
    """Change the file, run the tests, and put it back."""
    path, start = tree / fault.file, time.perf_counter()
    right, compiled = path.read_text(), fault.file.startswith("csrc/cpu/")
    module = tree / "fastcss" / "_cpu.abi3.so"
    kept = module.read_bytes() if compiled else b""
    path.write_text(right.replace(fault.old, fault.new))
    try:
        if compiled:
            build(tree)
        by, caught = first_failure(tree, fault.tests)
    finally:
        path.write_text(right)
        if compiled:
            module.unlink()
            module.write_bytes(kept)
    return Found(by, caught, time.perf_counter() - start)


def build(tree: Path) -> None:
    """Compile what was changed, in place; whatever was there before in this copy is not compiled again."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FASTCSS_REQUIRE_COMPILED": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the planted fault does not compile:\n{done.stderr[-2000:]}")


def first_failure(tree: Path, tests: str) -> tuple[str, bool]:
    """(the first test that fails, True); or (what came instead, False)."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os._exit(run_tests(tree, tests, said.fileno()))
        code = wait_for(child)
        said.seek(0)
        lines = said.read()
    if code is None:
        return f"no end after {SECONDS} s", True
    if code < 0:
        return f"the process ends by signal {-code}", True
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", lines, re.MULTILINE)
    if code in (1, 2) and failed:
        return failed[1], True
    said = re.findall(r"^.*(?:passed|failed|error|no tests ran).*$", lines, re.MULTILINE) or lines.splitlines()
    return f"NOT CAUGHT ({said[-1].strip() if said else f'exit code {code}'})", False


def preload() -> None:
    """Import what tests import and no fault is in, once for all of them: a child of this process has it already."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TRITON_INTERPRET="1")
    for package in ("torch", "numpy", "triton", "hypothesis", "transformers", "peft"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)


def run_tests(tree: Path, tests: str, output: int) -> int:
    """Run pytest in the copy of the tree, in a child, and return its exit code."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[0] = str(tree)
    sys.dont_write_bytecode = True
    os.setpgid(0, 0)
    options = ("-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-p", "no:faulthandler")
    try:
        return int(pytest.main([*options, *shlex.split(tests)]))
    except BaseException as error:  # whatever comes, this process may not go on as its parent would
        print(error, flush=True)
        return 3


def wait_for(child: int) -> int | None:
    """Its exit code, below 0 for a signal; None where it was killed after ``SECONDS``."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
