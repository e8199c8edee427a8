"""Tests the pieces of the C++ ops one by one: micro-kernel, packed lengths, partial select, bilinear taps."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc" / "cpu"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    from torch.utils.cpp_extension import load

    pieces = ("gemm", "instruction_set", "pack", "partial_select", "rows")
    sources = [HERE / "cpu_pieces.cpp", *(CSRC / f"{name}.cpp" for name in pieces)]
    flags = ["-O1", "-std=gnu++20", "-ffp-contract=fast", "-Wno-psabi"]
    folder = tmp_path_factory.mktemp("cpu_pieces")
    return load("cpu_pieces", [str(s) for s in sources], extra_cflags=flags, build_directory=str(folder))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# --- instruction set -------------------------------------------------------------------------------------------------

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are those of x86-64")


@X86
@pytest.mark.parametrize(
    ("has_v3", "has_v4", "asked", "level"),
    [
        (False, False, "", 1),
        (False, True, "", 1),  # 512-bit vectors without, say, BMI2
        (True, False, "", 3),
        (True, True, "", 4),
        (True, True, "avx2", 3),
        (True, True, "avx512", 4),
        (True, True, "default", 1),
        (False, False, "avx2", 1),
    ],
)
def test_level_is_what_the_cpu_has_whole_or_less_if_asked(pieces, has_v3, has_v4, asked, level):
    assert pieces.level_of(has_v3, has_v4, asked) == level


@X86
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64 here")
def test_level_on_other_cpus(tmp_path):
    """A Haswell has x86-64-v3; without F16C it has AVX2 and FMA, and code for v3 dies of an illegal instruction."""
    program = tmp_path / "level"
    source = '#include "instruction_set.h"\nint main() { return fastcss::cpu::kLevel; }'
    command = [
        "c++",
        "-std=gnu++20",
        "-Wno-psabi",
        f"-I{CSRC}",
        "-x",
        "c++",
        "-",
        CSRC / "instruction_set.cpp",
        "-o",
        program,
    ]
    subprocess.run(command, input=source, text=True, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    for cpu, level in (("Haswell", 3), ("Haswell,-f16c", 1), ("Haswell,-bmi2", 1), ("Nehalem", 1)):
        done = subprocess.run(["qemu-x86_64", "-cpu", cpu, program], env=environment, stderr=subprocess.DEVNULL)
        assert done.returncode == level, cpu


# --- micro-kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("terms", [1, 2, 17, 511, 512, 513, 1025])  # sums are joined every 512 terms
def test_micro_kernel(pieces, columns, terms):
    for rows in range(1, pieces.panel_height() + 1):
        a, b, start = normal(rows, terms), normal(terms, columns, seed=1), normal(rows, columns, seed=2)
        want = a.astype(np.float64) @ b + start
        found = pieces.micro_kernel(a, b, start, False)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * terms**0.5 * 4, err_msg=f"{rows} rows")


@pytest.mark.parametrize("terms", [1, 2, 33, 1024])
def test_micro_kernel_of_bfloat16_pairs(pieces, terms):
    """Products of numbers that bfloat16 holds must be exact; only the sums are rounded."""
    if not pieces.has_pairs():
        pytest.skip("this CPU does not multiply bfloat16")
    rows = pieces.panel_height()
    a, b = (torch.from_numpy(x).bfloat16().float().numpy() for x in (normal(rows, terms), normal(terms, 32, seed=1)))
    found = pieces.micro_kernel(a, b, np.zeros((rows, 32), np.float32), True)
    np.testing.assert_allclose(found, a.astype(np.float64) @ b, rtol=0, atol=1e-6 * terms**0.5 * 4)


def test_micro_kernel_sums_do_not_depend_on_the_tile(pieces):
    """A row and a column must give the same bits in a tile of their own and in a full one."""
    height = pieces.panel_height()
    a, b, start = normal(height, 700), normal(700, 32, seed=1), normal(height, 32, seed=2)
    whole = pieces.micro_kernel(a, b, start, False)
    for i, j in ((0, 0), (height - 1, 31), (height // 2, 16)):
        alone = pieces.micro_kernel(a[i : i + 1], b[:, j : j + 1], start[i : i + 1, j : j + 1], False)
        assert alone[0, 0] == whole[i, j]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (13, 33, 65), (25, 70, 600)])
def test_product_of_any_strides(pieces, m, n, k):
    left, right = normal(m, k), normal(k, n, seed=1)
    want = left.astype(np.float64) @ right
    for found in (pieces.product(left, right, False), pieces.product(left, np.ascontiguousarray(right.T), True)):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6 * k**0.5 * 4)


@pytest.mark.parametrize("pairs", [False, True])
def test_lengths_of_a_packed_panel(pieces, pairs):
    if pairs and not pieces.has_pairs():
        pytest.skip("this CPU does not multiply bfloat16")
    rows = torch.from_numpy(normal(21, 77)).bfloat16().float()
    rows[3] = 0
    want = 1 / torch.linalg.vector_norm(rows.double(), dim=1).clamp_min(1e-12)
    np.testing.assert_allclose(pieces.panel_lengths(rows.numpy(), pairs), want.numpy(), rtol=3e-7)


# --- partial select --------------------------------------------------------------------------------------------------


def ordered(values: np.ndarray, k: int) -> list[int]:
    return torch.from_numpy(values).sort(descending=True, stable=True).indices[:k].tolist()


@pytest.mark.parametrize("n", [1, 5, 16, 17, 847, 16384])
@pytest.mark.parametrize("k", [1, 2, 32, 512])
def test_select_random_values(pieces, n, k):
    values = normal(n)
    assert pieces.select(values, min(n, k)) == ordered(values, k)


def test_select_ties_go_to_the_lower_index(pieces):
    values = np.random.default_rng(0).integers(0, 4, 5000).astype(np.float32)
    for k in (1, 40, 2000, 5000):
        assert pieces.select(values, k) == ordered(values, k)


@pytest.mark.parametrize("order", ["rising", "falling", "constant"])
def test_select_sorted_values(pieces, order):
    values = {
        "rising": np.arange(3000, dtype=np.float32),
        "falling": -np.arange(3000, dtype=np.float32),
        "constant": np.zeros(3000, np.float32),
    }[order]
    assert pieces.select(values, 70) == ordered(values, 70)


def test_select_takes_nan_first_and_zeros_as_equal(pieces):
    inf, nan = float("inf"), float("nan")
    values = np.array([-0.0, 0.0, nan, -inf, inf, -nan, 1e-45, -1e-45, 3e38], np.float32)
    assert pieces.select(values, 9) == [2, 5, 4, 8, 6, 0, 1, 7, 3]
    many = normal(9000)
    many[[7, 5000, 8999]] = nan  # after the bar is up, too
    assert pieces.select(many, 40) == ordered(many, 40)


# --- two bilinear steps as one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "crop", "size"),
    [
        (256, 1024, 1024),
        (256, 768, 375),
        (256, 683, 1365),
        (64, 200, 33),
        (7, 28, 100),
        (5, 3, 64),
        (1, 4, 9),
        (1, 1, 1),
        (3, 12, 1),
    ],
)
def test_taps_are_two_interpolations(pieces, inputs, crop, size):
    """The weights of every output must be those of the two resizings of the unit vectors."""
    unit = torch.eye(inputs, dtype=torch.float64)[:, None]  # [inputs, 1, inputs]
    middle = F.interpolate(unit, 4 * inputs, mode="linear", align_corners=False)[..., :crop]
    want = F.interpolate(middle, size, mode="linear", align_corners=False)[:, 0]  # [inputs, size]
    found = torch.zeros(inputs + 2, size, dtype=torch.float64)
    for i in range(size):
        first, weights = pieces.taps(i, inputs, crop, size)
        assert 0 <= first < inputs
        found[first : first + 3, i] += torch.tensor(weights, dtype=torch.float64)
    assert not found[inputs:].any()  # nothing is read beyond the end
    torch.testing.assert_close(found[:inputs], want, rtol=0, atol=2e-4)  # positions are float32, as torch's are
