"""Tests the benchmark harness: what it refuses, what it writes, and its arithmetic."""

import json
import re

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import __main__ as command_line
from benchmarks import harness, limits, measure, registry, report
from benchmarks.cases import ENGINES, Case, NotInstalled, Problem, largest_error

FIELDS = {
    "op", "case", "shape", "mode", "provider", "device", "dtype", "median_ms", "p20_ms", "p80_ms", "calls", "peak_mib",
    "gflops", "gbps", "limit_ms", "error", "verified", "torch", "triton", "commit", "source_sha", "malloc", "date",
    "device_name",
}  # fmt: skip


def broken():
    raise RuntimeError("no such kernel\nand more lines")


def absent():
    raise NotInstalled("some_engine (pip install it)")


@pytest.fixture
def slow_machine(monkeypatch):
    """Spares the measurement of this machine's limits, which copies 256 MiB."""
    monkeypatch.setattr(limits, "measured_limits", lambda device, dtype: limits.Limits(gemm=1e9, copy=1e9))


@pytest.fixture
def case(slow_machine):
    """Makes a case of a sum of two vectors, which is right twice, wrong in four ways, and twice does not run."""
    x = torch.arange(1.0, 1 + 2**18)
    wrong_place = 2 * x
    wrong_place[-1] += 8
    providers = {
        "fastcss": lambda: lambda: (x + x,),
        "double": lambda: lambda: (2 * x,),
        "zeros": lambda: lambda: (torch.zeros_like(x),),
        "nan": lambda: lambda: (2 * x * float("nan"),),
        "short": lambda: lambda: (2 * x[:-1],),
        "one too many": lambda: lambda: (2 * x, x),
        "one element": lambda: lambda: (wrong_place,),
        "broken": broken,
        "absent": absent,
    }

    def build(device, mode):
        return Problem(providers, lambda: (2 * x.double(),), 1e-6, flops=2e6, bytes=1e6)

    return Case("toy", "toy/sum", {"n": len(x)}, torch.float32, build, sources=())


@pytest.fixture
def outcome(case):
    return harness.run(case, "fwd", "cpu", malloc="default", seconds=0.0)


def test_wrong_outputs_are_refused_and_never_timed(outcome):
    rows = {row["provider"]: row for row in outcome.rows}
    assert {name for name, row in rows.items() if row["verified"]} == {"fastcss", "double"}
    for name in ("zeros", "nan", "short", "one too many", "one element"):
        assert (rows[name]["median_ms"], rows[name]["peak_mib"]) == (None, None)
        assert outcome.remarks[name].startswith("refused")
    assert outcome.remarks["broken"] == "not run: RuntimeError: no such kernel"
    assert outcome.remarks["absent"] == "not installed: some_engine (pip install it)"
    assert {"broken", "absent"}.isdisjoint(rows)


def test_a_provider_that_another_one_disturbs_is_refused(slow_machine):
    state = {"factor": 2}

    def careless():
        state["factor"] = 3
        return (torch.full((4,), 2.0),)

    providers = {"disturbed": lambda: lambda: (torch.full((4,), float(state["factor"])),), "fastcss": lambda: careless}
    expected = torch.full((4,), 2.0, dtype=torch.float64)
    case = Case(
        "toy", "toy/state", {}, torch.float32, sources=(),
        build=lambda device, mode: Problem(providers, lambda: (expected,), 1e-6, flops=1, bytes=1),
    )  # fmt: skip
    outcome = harness.run(case, "fwd", "cpu", malloc="default", seconds=0.0)
    assert {row["provider"]: row["verified"] for row in outcome.rows} == {"disturbed": False, "fastcss": True}
    assert "beside the others" in outcome.remarks["disturbed"]


def test_whole_numbers_must_be_equal():
    index = torch.tensor([[700, 3]])
    assert largest_error((index,), (index.clone(),)) == 0
    assert largest_error((index,), (index + torch.tensor([0, 1]),)) == float("inf")


def test_convolutions_are_of_full_precision_and_torch_still_exports():
    assert not torch.backends.cudnn.allow_tf32
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    assert program.module()(torch.zeros(1, 2)).shape == (1, 3)


def test_rows_have_the_fields_and_their_values(outcome):
    row = outcome.rows[0]
    assert set(row) == FIELDS
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["limit_ms"] == pytest.approx(2.0)
    assert row["gflops"] == pytest.approx(2e6 / row["median_ms"] / 1e6)
    assert row["peak_mib"] == pytest.approx(1.0, abs=0.01)
    assert row["calls"] == measure.ROUNDS
    assert (row["dtype"], row["malloc"], row["device"]) == ("float32", "default", "cpu")
    json.dumps(row)


def test_an_engine_has_no_peak_as_its_memory_is_not_seen(case, capsys):
    providers = case.build("cpu", "fwd").providers
    providers[ENGINES[0]] = providers["double"]
    outcome = harness.run(case, "fwd", "cpu", malloc="default", seconds=0.0)
    row = next(row for row in outcome.rows if row["provider"] == ENGINES[0])
    assert row["verified"]
    assert row["median_ms"] > 0
    assert row["peak_mib"] is None
    report.show(outcome, Console(width=160))
    assert re.search(rf"│ {ENGINES[0]} .* │ +– │", capsys.readouterr().out)


def test_the_limit_is_the_slower_of_products_and_copies():
    machine = limits.Limits(gemm=100e9, copy=10e9)
    assert machine.ms(flops=1e9, bytes=1e6) == pytest.approx(10)
    assert machine.ms(flops=1e6, bytes=1e9) == pytest.approx(100)


def test_measured_limits_are_rates_of_this_machine(monkeypatch):
    monkeypatch.setitem(limits.COPIED, "cpu", 16 << 20)  # a rate as well, of whatever memory
    found = limits.measured_limits("cpu", torch.float32)
    assert 1e8 < found.gemm < 1e14
    assert 1e8 < found.copy < 1e13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "no op 'no_such_op'; there are: affinity_attention, affinity_loss"),
        (["multi_lora", "--case", "nowhere"], "no case starts with 'nowhere'; there are:\n  multi_lora/shared-m1024"),
        (["--mode", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_bad_names_are_answered_with_the_list(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_exit_code_says_whether_fastcss_was_right(case, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "all_cases", lambda device, quick: [case])
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--mode", "fwd", "--malloc", "default", "--out", str(out)]
    assert command_line.main(arguments) == 0
    assert "refused: its error is" in capsys.readouterr().out
    assert len(report.read(out)) == 7
    case.build("cpu", "fwd").providers["fastcss"] = broken
    assert command_line.main(arguments) == 1


def test_other_providers_are_left_out(case):
    calls = len(case.build("cpu", "fwd").providers)
    outcome = harness.run(case, "fwd", "cpu", malloc="default", seconds=0.0, providers=("double", "nobody"))
    assert calls > 2
    assert [row["provider"] for row in outcome.rows] == ["fastcss", "double"]
    assert "no such provider, but fastcss, " in outcome.remarks["nobody"]


def test_newer_rows_replace_older_ones(outcome, tmp_path):
    path = tmp_path / "rows.jsonl"
    report.merge_into(path, outcome.rows)
    other = [row | {"case": "toy/other"} for row in outcome.rows[:1]]
    newer = [row | {"median_ms": 1.0} for row in outcome.rows[:2]]
    report.merge_into(path, other)
    report.merge_into(path, newer)
    rows = report.read(path)
    assert [row["median_ms"] for row in rows[:2]] == [1.0, 1.0]
    assert [row["case"] for row in rows] == [*(row["case"] for row in newer), "toy/other"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert "Infinity" not in path.read_text()


def test_a_failed_write_leaves_the_old_file(outcome, tmp_path):
    path = tmp_path / "rows.jsonl"
    report.merge_into(path, outcome.rows)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.merge_into(path, [outcome.rows[0] | {"shape": object()}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_source_hash_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "gemm.h"
    kernel.write_text("a")
    before = harness.source_sha([])
    (tmp_path / "notes.txt").write_text("not a source")
    assert harness.source_sha([]) == before
    kernel.write_text("b")
    assert harness.source_sha([]) != before
