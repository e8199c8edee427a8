"""Tests that what the Triton ops launch compiles for three GPU generations, with the host's tiles, and does not spill.

``launches/`` has the calls of each family of ops, at the sizes that they are for.
"""

from __future__ import annotations

import functools
import importlib

import pytest
from compile_only import ARCHITECTURES, FAMILIES, SHARED_MEMORY, TENSOR_CORE, compiled_by, run
from reports import Reports

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(reports: Reports):
    """``compiled(family)``: the rows of all kernels that its calls launch."""
    return functools.cache(lambda family: compiled_by(family, reports))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_without_spills(family, architecture, compiled, record_table):
    """The kernels of the family and no other; shared memory is enough, and 16-bit products are done on tensor cores
    where there are any."""
    rows = [row for row in compiled(family) if row["sm"] == architecture]
    assert {row["kernel"] for row in rows} == importlib.import_module(f"launches.{family}").KERNELS
    columns = ("sm", "kernel", "dtype", "warps", "registers", "spills", "shared")
    for row in rows:
        record_table("compiled Triton kernels", {name: row[name] for name in columns})
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[architecture], row
        if row["dtype"] != "float32" and row["dots"]:  # float32 products are exact, which no tensor core does
            assert row["instructions"], f"none of {TENSOR_CORE[architecture]}: {row}"


def test_the_compiler_says_the_same_again(compiled):
    """The first calls are compiled again; the rest is known from the sources, see ``reports``."""
    kept, again = compiled("multi_lora"), run("multi_lora", "1")
    assert {row["sm"] for row in again} == {80, 90, 100}
    for row in again:
        assert row in kept


# --- how many programs a multiprocessor holds ------------------------------------------------------------------------


def test_hopper_holds_two_programs_where_the_splits_count_on_it(compiled):
    """tanh beside products: 65,536 registers for two programs, or more, of up to 160 value columns."""
    rows = [row for row in compiled("affinity") if row["sm"] == 90 and row["kernel"] == "affinity_kernel"]
    narrow = [row for row in rows if row["width"] <= 150 and row["key_width"] == 64 and row["dtype"] != "float32"]
    assert narrow
    for row in narrow:
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
        assert 2 * row["shared"] <= 227 * 1024, row


def test_two_programs_of_a_short_text_share_a_hopper_multiprocessor(compiled):
    """If memory is the limit, one must load while the other multiplies: both have 65,536 registers and 227 KiB, of
    which the system takes 1 KiB each."""
    rows = [row for row in compiled("bi_attention") if row["sm"] == 90 and row["kernel"] == "attend_kernel"]
    rows = [row for row in rows if row["dtype"] == "bfloat16" and row["length"] == 20]
    assert rows
    for row in rows:
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
        assert 2 * (row["shared"] + 1024) <= 227 * 1024, row


def test_hopper_holds_two_programs_that_look_for_maxima(compiled):
    """One multiplies while the other is in its epilogue: 65,536 registers and 227 KiB for both."""
    rows = [row for row in compiled("cost_filter") if row["sm"] == 90 and row["kernel"] == "largest_cost_kernel"]
    rows = [row for row in rows if row["dtype"] != "float32"]
    assert rows
    for row in rows:
        assert "wgmma.mma_async" in row["instructions"], row
        assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
        assert 2 * row["shared"] <= 227 * 1024, row


def test_hopper_holds_enough_warps_to_wait_for_memory(compiled):
    """A multiprocessor needs some 40 KiB on their way for its share of 4.8 TB/s at 1 µs, and L2 is faster. A warp has a
    level's 16 reads of 16 bytes a thread, 8 KiB; 16 warps share 65,536 registers."""
    rows = [row for row in compiled("deformable_attention") if row["sm"] == 90]
    rows = [row for row in rows if row["kernel"] == "deformable_attention_kernel"]
    rows = [row for row in rows if (row["dtype"], row["queries"], row["width"]) == ("bfloat16", 17821, 32)]
    assert rows
    for row in rows:
        assert 16 * 32 * row["registers"] <= 65536, row


def test_other_sizes_of_levels_compile_nothing_anew(compiled):
    """128, 64, 32 and 16 rows, for which Triton would: what it knows of an argument are multiples of 16."""
    assert not [row for row in compiled("deformable_attention") if row["height"] != 100]


@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        ("top_margin_kernel", 512),  # 512² pixels, 512 of bfloat16 a program
        ("layer_kernel", 640),  # 20 rows of 1024 columns
    ],
)
def test_hopper_holds_all_programs_at_once(compiled, kernel, programs):
    """Kernels that memory limits have no second wave: a multiprocessor has 65,536 registers for 1/132 of them."""
    rows = [row for row in compiled("selection") if row["sm"] == 90 and row["kernel"] == kernel]
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    assert rows
    for row in rows:
        assert -(-programs // 132) * 32 * row["warps"] * row["registers"] <= 65536, row


def test_hopper_holds_the_programs_that_are_to_run_at_once(compiled):
    """A program takes as many windows as it takes for one wave of them."""
    programs = {"window_attention_kernel": (4, 4), "window_gradients_kernel": (3, 2)}
    rows = [row for row in compiled("window_attention") if row["sm"] == 90 and row["dtype"] == "bfloat16"]
    rows = [row for row in rows if row["kernel"] in programs and row["window"] in (7, 8)]
    assert {row["kernel"] for row in rows} == set(programs)
    for row in rows:
        count = programs[row["kernel"]][row["need_bias"]]
        assert count * 32 * row["warps"] * row["registers"] <= 65536, row
        assert count * row["shared"] <= SHARED_MEMORY[90], row


def test_all_stages_share_their_kernels(compiled):
    """Neither the sizes of the map nor heads, shift or strides of a packed projection make a kernel of their own."""
    rows = compiled("window_attention")
    alike = [row for row in rows if (row["dtype"], row["window"], row["width"]) == ("bfloat16", 7, 32)]
    assert not [row for row in alike if (row["stage"] or row["packed"]) and row["kernel"] != "sum_parts_kernel"]
