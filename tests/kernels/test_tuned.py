"""The table of measured tiles: how kernels read it, and that what is in it may be there."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from compile_only import CompileOnly  # noqa: E402

from fastcss import kernels  # noqa: E402

kernels.register()

from fastcss.kernels import multi_lora, tuned, tuned_tiles  # noqa: E402

SIZES = "multi_lora.expand_tile 32768 256 32 bfloat16 write"
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 4}


@pytest.fixture
def on(monkeypatch):
    """``on(90)``: as if launches were for that GPU."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return lambda architecture: monkeypatch.setattr(triton.runtime.driver, "_active", CompileOnly(architecture))


def expand_tile(rows: int, width: int = 256) -> dict[str, int]:
    return multi_lora.expand_tile(rows, width, 32, torch.bfloat16, "write")


def test_the_table_is_read_for_its_sizes_and_its_gpu(on, monkeypatch):
    on(90)
    chosen = expand_tile(17821)
    monkeypatch.setitem(tuned_tiles.TILES, 90, {SIZES: TILE})
    assert chosen != TILE
    assert expand_tile(17821) == expand_tile(32768) == TILE  # one class
    assert expand_tile(32769) == expand_tile(17821, width=257) == chosen
    on(80)
    assert expand_tile(17821) == chosen


def test_the_interpreter_has_no_table(monkeypatch):
    chosen = expand_tile(17821)
    monkeypatch.setitem(tuned_tiles.TILES, 90, {SIZES: TILE})
    assert expand_tile(17821) == chosen


def test_sizes_of_all_kinds():
    columns = kernels.affinity_tiles.Columns.of(150, 256)
    assert tuned.size_class("f", (5, columns, torch.float16, True, "sum")) == "f 8 256,1,128,32 float16 True sum"


def test_tiles_of_the_table_may_be_there():
    for of_arch in tuned_tiles.TILES.values():
        for sizes, tile in of_arch.items():
            free = tuned.FREE[sizes.split()[0]]
            assert set(free) & set(tile)
            for name in set(free) & set(tile) - {"num_stages"}:
                assert tile[name] & (tile[name] - 1) == 0, (sizes, name)
