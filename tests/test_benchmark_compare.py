"""Tests rows against older rows: what is a regression, what is noise, and what cannot be compared."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")


from benchmarks import __main__ as command_line
from benchmarks import compare, harness, limits, registry, report
from benchmarks.cases import Case, Problem

MEDIANS = {"fastcss": 10.0, "literal": 80.0, "compiled": 20.0}


def rows(case="toy/sum", mode="fwd", spread=1.0, times=1.0, medians=MEDIANS, **changes):
    """Make one row per provider; ``spread`` is p80 ÷ p20, ``times`` multiplies MEDIANS."""
    common = {
        "op": "toy", "case": case, "mode": mode, "dtype": "float32", "device": "cpu", "device_name": "CPU, 2 threads",
        "malloc": "tuned", "verified": True,
    }  # fmt: skip
    return [
        common
        | {"provider": name, "median_ms": times * ms}
        | {"p20_ms": times * ms / spread**0.5, "p80_ms": times * ms * spread**0.5}
        | changes
        for name, ms in medians.items()
    ]


def ours(ms, **changes):
    return rows(medians=MEDIANS | {"fastcss": ms}, **changes)


def only(found):
    (change,) = found.changes
    return change


def test_what_slows_everyone_down_is_no_regression():
    change = only(compare.compare(rows(times=3.0), rows()))
    assert change.factor == pytest.approx(1)
    assert change.peers == pytest.approx(3)
    assert not change.regressed


@pytest.mark.parametrize(("ms", "regressed"), [(10.9, False), (11.1, True), (5.0, False)])
def test_without_a_spread_a_tenth_is_noise(ms, regressed):
    found = compare.compare(ours(ms, times=2.0), rows())
    assert only(found).factor == pytest.approx(ms / 10)
    assert only(found).noise == pytest.approx(1.1)
    assert (only(found).regressed, found.worse) == (regressed, regressed)


def test_peers_count_by_their_geometric_mean():
    medians = {"fastcss": 10.0, "literal": 160.0, "compiled": 40.0 / 9}
    assert only(compare.compare(rows(medians=medians), rows())).factor == pytest.approx(1.5)


@pytest.mark.parametrize(("new", "old"), [(1.44, 1.0), (1.0, 1.44)], ids=["of the new file", "of the old file"])
def test_noise_of_either_file_counts(new, old):
    """Half of the rows have s = ln 1.2, so u² = (ln 1.2)² (1 + 2 ÷ 2²)."""
    found = compare.compare(rows(spread=new), rows(spread=old))
    assert only(found).noise == pytest.approx(1.1 * math.exp(2 * math.log(1.2) * math.sqrt(1.5)))


def test_noise_grows_with_the_spread_of_every_row():
    """Each row has s = ½ ln 1.44 = ln 1.2, so u² = 2 (ln 1.2)² (1 + 2 ÷ 2²) in all."""
    noise = 1.1 * math.exp(2 * math.log(1.2) * math.sqrt(3))
    found = compare.compare(ours(noise * 9.99, spread=1.44), rows(spread=1.44))
    assert only(found).noise == pytest.approx(noise)
    assert not only(found).regressed
    assert only(compare.compare(ours(noise * 10.01, spread=1.44), rows(spread=1.44))).regressed


def test_only_peers_that_are_right_in_both_count():
    old, new = rows(), rows(times=2.0)
    old[1] |= {"verified": False, "median_ms": None, "p20_ms": None, "p80_ms": None}
    new[2]["median_ms"] *= 1.5
    assert only(compare.compare(new, old)).factor == pytest.approx(1 / 1.5)
    assert compare.compare(new[:1], old).alone == ["toy/sum fwd float32"]


def test_variants_of_ours_are_no_peers():
    medians = MEDIANS | {"fastcss-packed": 10.0}
    slower = medians | {"fastcss": 20.0, "fastcss-packed": 20.0}
    assert only(compare.compare(rows(medians=slower), rows(medians=medians))).factor == pytest.approx(2)


def test_a_gpu_is_its_own_measure():
    """Peers must not count on a GPU, and our CUDA graph is a row of ours like the other."""
    gpu = {"device": "cuda", "device_name": "GPU"}
    old = ours(10.0, **gpu) + rows(medians={"fastcss+graph": 4.0}, **gpu)
    new = ours(10.5, times=2.0, **gpu) + rows(medians={"fastcss+graph": 4.2}, **gpu)
    found = compare.compare(new, old)
    assert {change.point: change.regressed for change in found.changes} == {
        "toy/sum fwd float32": True,
        "toy/sum fwd float32+graph": False,
    }
    assert found.changes[0].factor == pytest.approx(2.1)


def test_what_is_gone_or_wrong_is_told():
    old = [*rows(), *rows(mode="bwd"), *rows("toy/other"), *rows("toy/never right", verified=False)]
    new = rows() + rows(mode="bwd", verified=False) + rows("toy/new")
    found = compare.compare(new, old)
    assert (found.gone, found.wrong) == (["toy/other fwd float32"], ["toy/sum bwd float32"])
    assert found.worse
    assert compare.compare([row for row in new if row["provider"] != "fastcss"] + rows(mode="bwd"), old).gone == [
        "toy/sum fwd float32",
        "toy/other fwd float32",
    ]


@pytest.mark.parametrize(
    "other", [{"device_name": "GPU"}, {"malloc": "default"}, {"dtype": "bfloat16"}, {"mode": "bwd"}]
)
def test_other_machines_and_kinds_are_never_compared(other):
    with pytest.raises(ValueError, match=r"nothing to compare: new are 1 cases \(toy/sum, …\) on .*; old are 1 cases"):
        compare.compare(rows(**other), rows())
    found = compare.compare(rows(**other) + rows(), rows())
    assert len(found.changes) == 1
    assert not found.gone


def test_machines_that_only_the_old_file_has_are_not_gone():
    assert not compare.compare(rows(), rows() + rows(device_name="another CPU")).worse


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_two_files_on_the_command_line(files, capsys):
    old = files("old.jsonl", rows() + rows("toy/other"))
    assert compare.main([old, old]) == 0
    assert capsys.readouterr().out == "nothing regressed in 2 cases and modes that were compared\n"
    assert compare.main([files("new.jsonl", ours(20.0)), old]) == 1
    printed = capsys.readouterr().out
    for part in ("slower than before", "10.000 → 20.000", "2.00×", "toy/other fwd float32: is gone", "1 of 1 cases"):
        assert part in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "old.jsonl, line 1 is no row of a benchmark: it lacks case, mode, dtype"),
        ('\n{"case": \n', "old.jsonl, line 2 is no JSON object: '{\"case\": '"),
        ("7\n", "old.jsonl, line 1 is no JSON object: '7'"),
        (b"\xff\xfe", "old.jsonl is no text"),
        ("", "nothing to compare: new are 1 cases"),
        (None, "No such file or directory"),
    ],
)
def test_wrong_files_are_named(text, message, files, tmp_path, capsys):
    old = tmp_path / "old.jsonl"
    if text is not None:
        old.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stopped:
        compare.main([files("new.jsonl", rows()), str(old)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def cases(monkeypatch):
    """Makes two cases of a sum, each with a peer that is right."""
    monkeypatch.setattr(limits, "measured_limits", lambda device, dtype: limits.Limits(gemm=1e9, copy=1e9))
    x = torch.arange(1.0, 1 + 2**10)

    def build(device, mode):
        providers = {"fastcss": lambda: lambda: (x + x,), "double": lambda: lambda: (2 * x,)}
        return Problem(providers, lambda: (2 * x.double(),), 1e-6, flops=2e3, bytes=1e3)

    found = [Case("toy", f"toy/{name}-quick", {}, torch.float32, build, (), ("fwd",)) for name in ("one", "two")]
    monkeypatch.setattr(registry, "all_cases", lambda device, quick: found)
    return found


QUICK = ["--quick", "--malloc", "default"]
HERE = {"device_name": harness.device_name("cpu"), "malloc": "default"}


def test_a_run_is_compared_with_the_file_it_replaces(cases, tmp_path, capsys):
    """If ours took 0.1 ns and every peer an hour before, it must have regressed; the other way round it must not."""
    file = str(tmp_path / "rows.jsonl")
    assert command_line.main([*QUICK, "--out", file]) == 0
    for ours_ms, peer_ms, code, verdict in (
        (1e-7, 3.6e6, 1, "2 of 2 cases and modes that were compared"),
        (3.6e6, 1e-7, 0, "nothing regressed in 2 cases and modes that were compared"),
    ):
        old = [
            row | dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), ours_ms if row["provider"] == "fastcss" else peer_ms)
            for row in report.read(Path(file))
        ]
        report.merge_into(Path(file), old)
        assert command_line.main([*QUICK, "--out", file, "--compare", file]) == code
        assert verdict in capsys.readouterr().out
        assert 1e-6 < report.read(Path(file))[0]["median_ms"] < 3.6e6


@pytest.mark.parametrize(
    ("slow", "code", "median", "verdict"),
    [(1, 0, 10.0, "nothing regressed in 2 cases"), (2, 1, 30.0, "1 of 2 cases")],
)
def test_only_what_is_slower_twice_regressed(slow, code, median, verdict, cases, tmp_path, capsys, monkeypatch):
    """One of two cases meets ``slow`` slow moments: it alone must be measured again, and the second result be kept."""
    file, measured = tmp_path / "rows.jsonl", []

    def run(case, mode, *rest):
        measured.append(case.name)
        slower = case.name == "toy/two-quick" and measured.count(case.name) <= slow
        return harness.Outcome(ours(30.0 if slower else 10.0, case=case.name, mode=mode, **HERE), remarks={})

    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(report, "show", lambda *outcome: None)
    report.merge_into(file, rows("toy/one-quick", **HERE) + rows("toy/two-quick", **HERE))
    assert command_line.main([*QUICK, "--out", str(file), "--compare", str(file)]) == code
    assert measured == ["toy/one-quick", "toy/two-quick", "toy/two-quick"]
    printed = capsys.readouterr().out
    assert "slower than before, so measured again: toy/two-quick fwd\n" in printed
    assert verdict in printed
    kept = {row["case"]: row["median_ms"] for row in report.read(file) if row["provider"] == "fastcss"}
    assert kept == {"toy/one-quick": 10.0, "toy/two-quick": median}


def test_only_what_was_selected_can_be_gone(cases, tmp_path, capsys):
    """A run says nothing of other ops, cases, modes, machines and sizes: their rows must not count as gone."""
    file = tmp_path / "rows.jsonl"
    others = rows("toy/one", **HERE) + rows("toy/lost-quick", mode="bwd", **HERE) + rows("toy/lost-quick")
    others += rows("other/lost-quick", op="other", **HERE)
    command_line.main([*QUICK, "--out", str(file)])
    report.merge_into(file, others)
    lost = rows("toy/lost-quick", **HERE)
    report.merge_into(file, lost)
    selected = [*QUICK, "toy", "--mode", "fwd", "--compare", str(file)]
    assert command_line.main(selected) == 1
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "is gone" in line] == [
        "  toy/lost-quick fwd float32: is gone, or did not run"
    ]
    capsys.readouterr()
    command_line.main([*selected, "--case", "one"])
    printed = capsys.readouterr().out
    assert "is gone" not in printed
    assert "toy/two" not in printed


@pytest.mark.parametrize("option", ["--compare", "--out"])
def test_a_wrong_file_stops_before_anything_is_run(option, cases, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("no row\n")
    with pytest.raises(SystemExit) as stopped:
        command_line.main([*QUICK, option, str(file)])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "rows.jsonl, line 1 is no JSON object" in printed.err
    assert not printed.out


def test_rows_of_another_machine_stop_before_anything_is_run(cases, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    report.merge_into(file, rows("toy/one-quick"))
    with pytest.raises(SystemExit):
        command_line.main([*QUICK, "--compare", str(file)])
    assert "has no rows of these cases with device 'cpu', device_name" in capsys.readouterr().err
