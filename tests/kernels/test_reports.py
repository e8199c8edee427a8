"""The kept reports are those of the kernels that are here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reports
from compile_only import compiled_by, run

PROGRAM = str(Path(__file__).with_name("test_compile.py"))


def test_the_compiler_says_the_same_again():
    pytest.importorskip("triton")
    kept, again = compiled_by(PROGRAM), run(PROGRAM, "1")
    assert {row["sm"] for row in again} == {80, 90, 100}
    for row in again:
        assert row in kept


def test_made_anew_for_other_sources_and_another_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "FOLDER", tmp_path)
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    source, made = tmp_path / "kernel.py", []

    def rows(compiler: str) -> list[dict]:
        return reports.report("name", [source], compiler, lambda: made.append(compiler) or [{"registers": len(made)}])

    source.write_text("a")
    assert rows("old") == rows("old") == [{"registers": 1}]
    assert rows("new") == rows("new") == [{"registers": 2}]
    source.write_text("b")
    assert rows("new") == rows("new") == [{"registers": 3}]
    assert made == ["old", "new", "new"]
    assert json.loads((tmp_path / "name.json").read_text())["rows"] == [{"registers": 3}]


def test_there_is_none_of_a_test_that_is_gone():
    names = {path.stem for path in reports.FOLDER.glob("*.json")}
    programs = {path.stem for path in Path(__file__).parent.glob("test_compile*.py")}
    cuda = {f"cuda_{path.stem}" for path in (reports.ROOT / "csrc" / "cuda").glob("*.cu")}
    assert names <= programs | cuda
