"""Tests the GPU campaign without a GPU: units that fail, hang and are stopped, and what the next call goes on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import campaign
from benchmarks.campaign import Campaign, Stage


def shell(**units: str) -> Stage:
    return Stage(lambda kept, rows: {name: ["sh", "-c", text] for name, text in units.items()}, at_a_time=2, limit=60)


def in_folder(tmp_path: Path) -> Campaign:
    return Campaign(tmp_path / "kept", tmp_path / "rows", tmp_path / "out", deadline=float("inf"))


def started(tmp_path: Path) -> str:
    """Read which units ran: each unit below appends its letter."""
    return "".join(sorted((tmp_path / "started").read_text().split()))


def test_a_failure_stops_nothing_and_what_is_done_is_not_done_again(tmp_path, capsys):
    note = f">> {tmp_path}/started"
    stage = shell(a=f"echo a {note}", b=f"echo b {note}; echo because; exit 3", c=f"echo c {note}")
    assert not in_folder(tmp_path).run("stage", stage)
    assert started(tmp_path) == "abc"
    assert "because" in capsys.readouterr().out
    assert not in_folder(tmp_path).run("stage", stage)
    assert started(tmp_path) == "abc"  # with these sources b fails again
    changed = in_folder(tmp_path)
    changed.sources = "others"
    mended = shell(a="exit 1", b=f"echo d {note}", c="exit 1")
    assert changed.run("stage", mended)
    assert started(tmp_path) == "abcd"
    printed = capsys.readouterr().out
    assert "stage: 3 of 3 done, 0 failed, 2 of them with other sources than these" in printed


def test_what_was_stopped_is_run_again(tmp_path):
    stage = shell(fast="echo fast", slow="sleep 60 & echo before; wait")
    stopped, start = in_folder(tmp_path), time.monotonic()
    stopped.deadline = start + 5
    assert not stopped.run("stage", stage)
    assert time.monotonic() - start < 40
    rows = [json.loads(line) for line in (tmp_path / "out" / "campaign.jsonl").read_text().splitlines()]
    assert [(row["unit"], row["rc"]) for row in rows] == [("stage/fast", 0)]
    log = (tmp_path / "out" / "campaign.log").read_text()
    assert "stage/slow: stopped, to be run again" in log
    assert "before" in log
    assert in_folder(tmp_path).run("stage", shell(fast="exit 1", slow="true"))
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {"campaign.jsonl", "campaign.log"}


def test_what_hangs_has_failed(tmp_path):
    hanging = shell(a="sleep 60")._replace(limit=0.5)
    assert not in_folder(tmp_path).run("stage", hanging)
    assert in_folder(tmp_path).ended["stage/a"]["rc"] == 137


def test_every_op_with_a_kernel_is_checked(tmp_path):
    from fastcss._dispatch import backends

    units = campaign.check(tmp_path, tmp_path)
    tested = {tool: " ".join(name for name in units if name.startswith(tool)) for tool in campaign.CHECKED}
    ops = {op for op in backends.KERNELS["triton"] if not op.endswith("_backward")} - {"pack_text"}  # cost_filter's
    assert len(ops) > 10
    for op in ops:
        assert all(f"test_{op.removesuffix('_attention')}" in names for names in tested.values()), op


def test_without_cuda_a_stage_of_cases_says_so(tmp_path):
    for stage in ("verify", "count"):
        (name,) = campaign.STAGES[stage].units(tmp_path, tmp_path)
        assert name == "list"


def test_every_op_with_a_kernel_is_counted_once(tmp_path, monkeypatch):
    from benchmarks import registry
    from fastcss._dispatch import backends

    names = [case.name for case in registry.all_cases("cuda")]
    monkeypatch.setattr(campaign, "of_each_case", lambda command: {name: command(name) for name in names})
    units = campaign.count(tmp_path, tmp_path)
    ops = {op for op in backends.KERNELS["triton"] if not op.endswith("_backward")}
    assert sorted(name.split("/")[0] for name in units) == sorted(ops & {name.split("/")[0] for name in names})
    assert all(command[-1] == name for name, command in units.items())


def test_an_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        campaign.main(["tests"])
    assert "no stage 'tests'; there are: build, test" in capsys.readouterr().err


TESTS = """
import pytest

@pytest.fixture
def device():
    return "cuda"

@pytest.mark.parametrize("number", range(6))
def test_of_a_gpu(number, device):
    assert number != 3, "three"

def test_that_spoils_its_process(device):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_of_no_device():
    raise AssertionError
"""


@pytest.fixture
def gpu_tests(tmp_path):
    """``gpu_tests()`` runs TESTS once, in two processes."""
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    shutil.copy(Path(__file__).with_name("gpu_run.py"), tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "gpu_run", "--kept", "kept.jsonl", "-n", "2"]
    command += ["--dist", "worksteal", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {**campaign.os.environ, "PYTHONPATH": str(tmp_path)}

    def run() -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_tests_of_a_gpu_go_on(gpu_tests, tmp_path):
    code, printed = gpu_tests()
    assert code == 1
    assert "of this run and those before: 5 passed, 2 failed, 0 skipped" in printed
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert any(row["outcome"] == "failed" and "three" in row["why"] for row in rows)
    test = tmp_path / "test_some.py"
    test.write_text(TESTS.replace("number != 3", "number == 3").replace("raise RuntimeError", "str"))
    code, printed = gpu_tests()
    assert code == 0, printed
    assert "2 passed" in printed  # those that had failed, and no other
    assert "7 passed, 0 failed" in printed
    assert gpu_tests()[0] == 0  # nothing is left
