"""Options, tolerances and printed tables that every test shares."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
from collections import defaultdict

# A thread that waits for work must not keep a core busy: there are as many processes as cores. Before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# oneDNN, and torch above it, keep what they made for each of the last 1024 shapes: 600 MB in a process of tests.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
# fastcss decides when it is imported whether Triton is available, and the conftest.py of a folder that the command line
# names imports it before any option is read. Processes of pytest-xdist have the variable from the first one.
if "PYTEST_XDIST_WORKER" not in os.environ and "--device=cuda" not in " ".join(sys.argv).replace(
    "--device ", "--device="
):
    os.environ["TRITON_INTERPRET"] = "1"

import left_out
import pytest
import torch
from private_apis import mend_triton_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and importlib.util.find_spec("triton"):
    mend_triton_interpreter()

_tables: dict[str, list[dict]] = defaultdict(list)

#: Undo ``fastcss.tune_malloc``, which an example and the benchmarks call: M_MMAP_MAX, M_MMAP_THRESHOLD (as large as it
#: gets by itself), M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>.
GLIBC_DEFAULTS = ((-4, 65536), (-3, 32 << 20), (-1, 64 << 20), (-2, 128 << 10))


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors of the tests live")
    parser.addoption(
        "--all-transforms", action="store_true", help="every op under every pair of transforms (tests/hardening)"
    )
    parser.addoption(
        "--fuzz-examples", type=int, help="random examples of each op, new ones each time (tests/hardening)"
    )
    parser.addoption(
        "--sequences", type=int, help="random sequences of changes under a runner, new ones each time (tests/one_pass)"
    )
    parser.addoption(
        "--keep-reports", action="store_true", help="replace what is kept of compiled kernels (tests/kernels/reports)"
    )


def pytest_configure(config):
    left_out.configure(config)
    config.pluginmanager.register(left_out)
    on_cpu = config.getoption("--device") == "cpu"
    if on_cpu != INTERPRETED:
        raise pytest.UsageError("--device goes on the command line, and TRITON_INTERPRET=1 with --device cpu alone")
    if not on_cpu:
        torch.backends.cudnn.allow_tf32 = False  # by default it is, and has 11 bits; see benchmarks/cases.py


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What is imported and collected stays to the end: each collection of garbage, one after every file, would look
    through its 700,000 objects for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_over():
    """A file's compiled graphs and garbage are of no use to the next one, and a process would grow to 5 GB by them; and
    by 300 MB if freed memory stayed with it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        for parameter, value in GLIBC_DEFAULTS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def _same_numbers():
    """A test draws the same numbers whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch starts all threads for the smallest of tensors, and those of several processes wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def tolerances() -> dict[torch.dtype, float]:
    from fastcss.selftest.comparison import TOLERANCES  # not before TRITON_INTERPRET is set, see above

    return TOLERANCES


@pytest.fixture(scope="session")
def record_table():
    """``record_table(title, row)``: rows of figures, printed as a table after the tests."""
    return lambda title, row: _tables[title].append(row)


def pytest_sessionfinish(session):
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":  # all of them have left out the same
        for row in left_out.rows():
            _tables["cases that are not made here"].append(row)
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["tables"] = dict(_tables)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for title, rows in getattr(node, "workeroutput", {}).get("tables", {}).items():
        _tables[title].extend(rows)


def pytest_terminal_summary(terminalreporter):
    for title, rows in _tables.items():
        terminalreporter.section(title)
        cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
