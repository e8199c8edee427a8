"""Memory that is refused is an error of the call and of nothing else; and large workspaces are given back."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import runs

from fastcss import ops

HERE = Path(__file__).parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and preloads as Linux has them")
def test_every_op_works_after_its_memory_was_refused(tmp_path, device):
    runs("cpu", device)
    environment, library = os.environ | {"OMP_WAIT_POLICY": "passive"}, tmp_path / "failing_malloc.so"
    compiler = shutil.which("cc")
    if compiler and hasattr(os, "confstr") and os.confstr("CS_GNU_LIBC_VERSION"):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "failing_malloc.c"], check=True)
        environment["LD_PRELOAD"] = str(library)
    program = [sys.executable, HERE / "refused_memory.py"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # tune_malloc, of an earlier test, lets the C library keep what is freed
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["top_classes", "phrase_pool"])
def test_large_workspaces_are_given_back(op, threads, one_thread, device):
    """Every thread must give its workspace back: each packs a row of 96 MiB, more than the 64 MiB that are kept."""
    runs("cpu", device)
    torch.set_num_threads(threads)
    zero = torch.zeros((), dtype=torch.bfloat16)
    size = 24 << 20  # floats
    calls = {
        "top_classes": lambda: ops.top_classes(zero.expand(threads, size), 1, impl="cpu"),
        "phrase_pool": lambda: ops.phrase_pool(zero.expand(1, 64), zero.expand(threads, size // 64, 64), impl="cpu"),
    }
    ops.top_classes(zero.expand(threads, 8), 1, impl="cpu")  # the threads are there
    before = resident()
    calls[op]()
    assert resident() - before < 32 << 20
