"""The self-test that the wheel ships: it has every op, passes here, and tells a wrong op."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

from fastcss import ops
from fastcss.selftest.inputs import CALLS

ROOT = Path(__file__).parents[1]

#: A plugin of pytest's: one composed op is off by a tenth of a percent.
WRONG = """
from fastcss.composed import phrase_pool

right = phrase_pool.phrase_pool
phrase_pool.phrase_pool = lambda *tensors: 1.001 * right(*tensors)
"""


def selftest(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the self-test in a process that finds the package as an installed one, without Triton's interpreter."""
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "fastcss.selftest", *arguments)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_op_that_has_implementations_is_in_it():
    have = {name for name in ops.__all__ if "impl" in inspect.signature(getattr(ops, name)).parameters}
    assert {name.partition(",")[0] for name in CALLS} == have


def test_it_passes_and_says_what_ran(tmp_path):
    run = selftest(tmp_path, "-k", "phrase_pool or loads or one_pass")
    assert run.returncode == 0, run.stdout
    (row,) = (line for line in run.stdout.splitlines() if line.startswith("phrase_pool "))
    assert row.split("  ")[-1].strip() in ("–", "4 passed")
    assert row.count("4 passed") >= 2
    assert "triton on cuda: " in run.stdout or row.count("4 passed") > 2


def test_it_fails_where_an_op_is_wrong(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    run = selftest(tmp_path, "-p", "wrong", "-k", "phrase_pool and composed-cpu")
    assert run.returncode == 1
    (row,) = (line for line in run.stdout.splitlines() if line.startswith("phrase_pool "))
    assert "2 FAILED" in row or "3 FAILED" in row
    assert "of the reference off" in run.stdout


def test_it_says_what_to_install_where_pytest_is_missing():
    program = (
        "import runpy, sys; sys.modules['pytest'] = None; runpy.run_module('fastcss.selftest', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.endswith("which is not installed: pip install 'fastcss[selftest]'\n")
