"""Tests tuning without a GPU: which tiles are tried, and the table that is made of the measured ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks import harness, tune

TILE = {"BLOCK_M": 64, "BLOCK_R": 16, "num_warps": 1, "num_stages": 2}


def row(sizes: str, case: str, ms: float, gained: float, tile: dict) -> dict:
    return {"arch": 90, "sizes": sizes, "case": case, "chosen": TILE, "chosen_ms": ms, "tile": tile, "ms": ms - gained}


def test_neighbours_differ_in_one_free_size():
    found = tune.neighbours(TILE | {"maxnreg": None}, ("BLOCK_M", "BLOCK_R", "num_warps", "num_stages"))
    changes = [{name: tile[name] for name in TILE if tile[name] != TILE[name]} for tile in found]
    assert changes == [
        {"BLOCK_M": 32},
        {"BLOCK_M": 128},
        {"BLOCK_R": 32},  # 16 is the least that products take
        {"num_warps": 2},
        {"num_stages": 1},
        {"num_stages": 3},
    ]
    assert [tile["BLOCK_M"] for tile in tune.neighbours(TILE, ("BLOCK_M",))] == [32, 128]


def test_the_longest_case_decides():
    better, other = TILE | {"BLOCK_M": 128}, TILE | {"num_stages": 3}
    rows = [
        row("f 64", "long", 2.0, 0.5, better),
        row("f 64", "short", 0.1, 0.05, other),
        row("g 64", "long", 2.0, 0.0, TILE),
    ]
    assert tune.table_of(rows) == tune.table_of(rows[::-1]) == {90: {"f 64": better}}
    assert tune.table_of(rows[2:]) == {}


def test_the_table_is_a_module(tmp_path):
    tiles = {90: {"f 64": TILE | {"maxnreg": None}}, 100: {"f 64": TILE}}
    source, found = tune.source_of(tiles), {}
    exec(source, found)
    assert found["TILES"] == tiles
    assert found["__doc__"] == tune.TABLE.read_text().split('"""')[1]
    file = tmp_path / "tuned_tiles.py"
    file.write_text(source)
    settings = ["--config", str(harness.ROOT / "pyproject.toml")]
    formatted = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", *settings, str(file)])
    assert formatted.returncode == 0


def test_an_empty_table_is_what_is_committed_for_no_rows():
    assert tune.source_of({}).endswith("]]] = {}\n")
