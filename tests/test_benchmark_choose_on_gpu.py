"""Tests which kernels impl="auto" may take on a GPU: those that rows of benchmarks/results support, and no others."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("rich")

from benchmarks import choose_on_gpu, harness, report
from fastcss._dispatch import backends


def rows_of(case: str, mode: str = "fwd", **times: float | None) -> list[dict]:
    """Make rows from times; None means that a provider ran and was wrong."""
    common = {"op": case.split("/")[0], "case": case, "mode": mode, "device": "cuda", "device_name": "A GPU"}
    common |= {"dtype": "bfloat16", "malloc": "tuned"}
    named = {name.replace("_", " "): ms for name, ms in times.items()}
    return [common | {"provider": name, "median_ms": ms, "verified": ms is not None} for name, ms in named.items()]


def test_a_kernel_is_faster_in_every_case_and_mode():
    rows = [
        *rows_of("f/small", triton=0.5, composed=1.0, cuda=0.4),
        *rows_of("f/small", "bwd", triton=1.0, composed=1.0, cuda=None),
        *rows_of("g/small", triton=0.5, composed=1.0),
        *rows_of("g/large", triton=2.0, composed=1.9),
        *rows_of("deformable_attention/x", by_level=1.0, triton=0.1),
        *rows_of("nothing_to_compare/x", fastcss=1.0, triton=0.1),
        *rows_of("cost_filter/topk-64", triton=0.5, composed=1.0, cuda=0.4),
    ]
    assert choose_on_gpu.supported(rows) == {
        "f": ("triton",),
        "deformable_attention": ("triton",),
        "top_classes": ("cuda", "triton"),
    }


def test_rows_of_a_cpu_support_nothing():
    rows = rows_of("f/x", triton=0.5, composed=1.0)
    assert choose_on_gpu.supported([row | {"device": "cpu"} for row in rows]) == {}


def test_it_says_where_a_kernel_lost(tmp_path, capsys):
    file = tmp_path / "gpu.jsonl"
    rows = rows_of("f/x", triton=0.5, composed=1.0) + rows_of("g/x", "bwd", triton=3.0, composed=2.0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert choose_on_gpu.main([str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "MEASURED_ON_GPU = {'f': ('triton',)}",
        "  triton takes 1.50 of the composed form's time: g/x bwd on A GPU",
    ]


def test_what_is_taken_was_measured():
    files = (harness.ROOT / "benchmarks" / "results").glob("*.jsonl")
    found = choose_on_gpu.supported([row for file in files for row in report.read(file)])
    for op, kernels in backends.MEASURED_ON_GPU.items():
        assert set(kernels) <= set(found.get(op, ())), op
