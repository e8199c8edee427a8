"""``python tests/planted_faults.py``: plants faults, one at a time, and says which test finds each.

The faults stand in ``tests/faults``: small wrong changes in all rooms, each with the tests that have to fail by it. A
fault is planted in a copy of the tree, never in the tree itself. Exit code 1: one was not found, or has no place to
stand in any more. A change of the suite that loses a fault makes the suite worse, however much faster it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from faults.fault import Fault
from faults.kernels import CPU, CUDA, TRITON
from faults.one_pass import FUSE, ONE_PASS
from faults.ops import OPS
from faults.systems import BENCHMARKS, COMMANDS, DATA, MODELS, NN

FAULTS = [*CPU, *TRITON, *CUDA, *OPS, *ONE_PASS, *FUSE, *NN, *MODELS, *DATA, *COMMANDS, *BENCHMARKS]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "out", "dist", ".pytest_cache", ".hypothesis")
#: Installed packages lie in folders of other names than they have in the tree.
LINKS = {"fastcss/kernels": "../kernels", "fastcss/cuda": "../csrc/cuda"}
SECONDS = 600  # after which a test counts as caught by hanging


class Found(NamedTuple):
    """What came of a planted fault: the test that failed by it, and whether one did."""

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
    lost = [f"{fault.name}: {reason}" for fault in faults if (reason := why_not(options.tree, fault))]
    print(*lost, sep="\n", end="\n" if lost else "")
    if options.list:
        return report_list(faults, lost)
    with tempfile.TemporaryDirectory() as temporary:
        tree = copied(options.tree.resolve(), options.scratch or Path(temporary) / "tree")
        faults = [fault for fault in faults if not why_not(tree, fault)]
        width, missed = max(len(fault.name) for fault in faults), 0
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
    shutil.copytree(tree, scratch, ignore=LEFT_OUT, dirs_exist_ok=True, symlinks=True)
    for link, target in LINKS.items():
        if not (scratch / link).is_symlink():
            (scratch / link).symlink_to(target)
    return scratch.resolve()


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
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            [*command, *shlex.split(tests)], cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s", True
    if done.returncode < 0:
        return f"the process ends by signal {-done.returncode}", True
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode in (1, 2) and failed:
        return failed[1], True
    said = done.stdout.strip().rpartition("\n")[2]
    return f"NOT CAUGHT ({said or done.stderr.strip()[-200:]})", False


if __name__ == "__main__":
    sys.exit(main())
