"""Tests that README.md and docs/measurements.md say what the rows say."""

from __future__ import annotations

import pytest

from benchmarks import tables
from benchmarks.table_cells import NONE, Point, mib, ratio, table, two_digits


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_say_what_the_rows_say(page):
    text = page.read_text()
    assert "<!-- measured:" in text
    assert tables.filled(text, tables.read_rows()) == text, "python -m benchmarks.tables writes it anew"


def test_every_part_is_on_a_page():
    pages = "".join(page.read_text() for page in tables.PAGES)
    for name in tables.PARTS:
        assert f"<!-- measured: {name} -->" in pages


def row(provider: str, ms: float, mebibytes: float = 1.0, verified: bool = True) -> dict:
    figures = {"median_ms": ms, "peak_mib": mebibytes, "limit_ms": 1.0, "verified": verified}
    return figures | {"case": "op/small", "mode": "fwd", "provider": provider}


def test_a_point():
    rows = [
        row("fastcss", 2.0, 0.26),
        row("literal", 30.0, 8.4),
        row("compiled", 5.0),
        row("broken", 1.0, verified=False),
    ]
    point = Point(rows, "op/small")
    assert (point.ms(), point.limit()) == ("2.0", "50%")
    assert point.times("literal", "compiled", "absent") == 2.5
    assert point.times("absent") is None
    assert point.fastest_besides() == "compiled"
    assert point.fastest_besides("compiled") == "literal"
    assert point.fastest_besides("compiled", "literal") is None
    assert [point.peak("fastcss"), point.peak("literal", "compiled"), point.peak("absent")] == ["0.3", "8", "–"]
    with pytest.raises(ValueError, match="no verified row of fastcss for op/small in mode bwd"):
        Point(rows, "op/small", "bwd")


def test_a_peak_that_is_not_known():
    point = Point([row("fastcss", 2.0), row("onnxruntime", 1.0, None), row("eager", 3.0, 8.4)], "op/small")
    assert [point.peak("onnxruntime"), point.peak("onnxruntime", "eager")] == [NONE, "8"]


def test_a_table_has_no_column_without_a_figure():
    lines = [["one", "1.0", NONE, NONE], ["two", NONE, NONE, "3.0"]]
    expected = "| op | a | c |\n| --- | --- | --- |\n| one | 1.0 | – |\n| two | – | 3.0 |"
    assert table(["op", "a", "b", "c"], lines) == expected


def test_digits():
    assert [two_digits(n) for n in (179.4, 9.96, 8.72, 0.996, 0.487)] == ["179", "10", "8.7", "1.0", "0.49"]
    assert [ratio(n) for n in (None, 0.94, 9.94, 9.96)] == ["–", "0.9", "9.9", "10"]
    assert [mib(n) for n in (143.7, 0.96, 0.94, 0.04)] == ["144", "1", "0.9", "< 0.1"]


def test_the_stamp_of_rows_of_two_days():
    rows = [
        {"device_name": "AMD EPYC, AVX512, 2 threads", "torch": "2.13.0+cpu", "date": date}
        for date in ("2026-11-21", "2026-11-19")
    ]
    assert tables.stamp(rows).endswith(", 2 threads, torch 2.13.0, 2026-11-19 to 2026-11-21.")


def test_an_unknown_part():
    with pytest.raises(ValueError, match=r"nothing is called 'tables'; there are: stamp, six tasks"):
        tables.filled("<!-- measured: tables -->\n<!-- end -->", {})
