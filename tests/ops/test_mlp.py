"""Norm, MLP and residual in one kernel, against float64. Where it is used tests/fuse/test_fused_mlp.py says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import left_out
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastcss
from fastcss._fuse.mlp import DTYPES

EPS = 1e-6
IMPLS = left_out.runnable("cpu")
pytestmark = pytest.mark.parametrize("impl", IMPLS)


def operands(rows: int, width: int, hidden: int, bias: bool = True, dtype=torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * max(1, shape[-1]) ** -0.5

    biases = [torch.randn(n, generator=generator) if bias else None for n in (hidden, width)]
    norm = torch.randn(2, width, generator=generator)
    x = 3 * torch.randn(rows, width, generator=generator) + 5
    given = [x, *norm, normal(hidden, width), biases[0], normal(width, hidden), biases[1]]
    return [t if t is None else t.to(dtype) for t in given]


def kernel(x, norm_weight, norm_bias, *layers) -> Tensor:
    return torch.ops.fastcss.mlp.cpu(x, norm_weight, norm_bias, EPS, *layers)


def by_torch(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2) -> Tensor:
    normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
    return x + F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)


# Hidden units are computed 504 words at a time; a word is one unit, or two in bfloat16.
SIZES = [
    *((0, 8, 8), (1, 1, 1), (5, 0, 3), (5, 3, 0), (1, 16, 32), (12, 7, 33), (37, 48, 101)),
    *((300, 50, 7), (70, 600, 1100), (33, 40, 1009)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(impl, sizes, bias, dtype):
    given = operands(*sizes, bias, dtype)
    exact = by_torch(*(None if x is None else x.double() for x in given))
    got, eager = (f(*given).double() for f in (kernel, by_torch))
    assert got.shape == exact.shape
    # An output of bfloat16 is off by 2⁻⁹ at most, and by half of that on average, however exact the rest.
    factor, tolerance = (1.5, 3e-7) if dtype is torch.float32 else (1.0, 2**-10)
    assert (got - exact).norm() <= factor * (eager - exact).norm() + tolerance * exact.norm()


def gelus(values: Tensor) -> Tensor:
    """Compute the GELU of each value as the bias of one hidden unit."""
    zero, one = torch.zeros(1, 1, dtype=values.dtype), torch.ones(1, 1, dtype=values.dtype)
    return torch.cat([kernel(zero, one[0], zero[0], zero, value[None], one, None)[0] for value in values])


INF, NAN = float("inf"), float("nan")
VALUES = torch.cat([torch.linspace(-14, 14, 561), torch.tensor([1e-30, -1e-30, -3e38, 3e38, INF, -INF, NAN])])


def test_gelu(impl):
    """The function itself in its tails, at its turn, and beyond the numbers."""
    got, own, exact = gelus(VALUES), F.gelu(VALUES), F.gelu(VALUES.double())
    assert got[-1].isnan()
    assert torch.equal(got[-4:-2], VALUES[-4:-2])  # torch's own float32 makes inf of 3e38, and NaN of inf
    finite = VALUES.abs() <= 14
    error, allowed = ((x - exact)[finite].abs().max() for x in (got, own))
    assert error <= allowed + 1e-7
    tails = VALUES.abs() <= 5
    assert ((got - exact).abs() <= 3e-6 * exact.abs() + 1e-37)[tails].all()


@pytest.mark.points(lambda: torch.bfloat16 in DTYPES, "the CPU multiplies bfloat16")
def test_gelu_of_bfloat16(impl):
    """It may be off by its rounding and a twentieth of that."""
    values = VALUES.bfloat16()
    got = gelus(values).double()
    exact = values.double() / 2 * torch.special.erfc(-values.double() * 0.5**0.5)  # F.gelu is 0 below −8
    assert got[-1].isnan()
    assert torch.equal(got[-4:-2], values[-4:-2].double())
    finite = values.abs() <= 12
    assert ((got - exact).abs() <= 1.05 * 2**-9 * 2 ** exact.abs().log2().ceil() + 1e-37)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_on_any_number_of_threads(impl, dtype):
    given = operands(333, 66, 1100, dtype=dtype)
    torch.set_num_threads(2)
    expected = kernel(*given)
    for row in (0, 11, 12, 31, 32, 200, 332):
        assert torch.equal(kernel(given[0][row : row + 1], *given[1:])[0], expected[row])
    torch.set_num_threads(1)
    assert torch.equal(kernel(*given), expected)


def test_a_nan_stays_with_its_row(impl):
    for dtype in DTYPES:
        given = operands(40, 17, 23, dtype=dtype)
        expected = kernel(*given)
        given[0][7, 3] = NAN
        got = kernel(*given)
        assert got[7].isnan().all()
        others = torch.arange(40) != 7
        assert torch.equal(got[others], expected[others])


LESSER = """
import sys
sys.path[:0] = sys.argv[1:]
import test_mlp
import torch

assert test_mlp.DTYPES == (torch.float32,)
for sizes in test_mlp.SIZES:
    test_mlp.test_equals_float64("cpu", sizes, True, torch.float32)
test_mlp.test_gelu("cpu")
test_mlp.test_a_row_is_the_same_alone_and_on_any_number_of_threads("cpu", torch.float32)
test_mlp.test_refuses_bfloat16_where_the_cpu_does_not_multiply_it("cpu")
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_on_lesser_instruction_sets(impl, capability):
    rooms = Path(__file__).parent, Path(left_out.__file__).parent, Path(fastcss.__file__).parents[1]
    program = [sys.executable, "-c", LESSER, *map(str, rooms)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_flops_are_counted(impl):
    given = operands(12, 16, 40)
    with FlopCounterMode(display=False) as counter:
        kernel(*given)
    assert counter.get_total_flops() == 2 * 2 * 12 * 16 * 40


@pytest.mark.parametrize("wrong", ["dtype", "two dtypes", "width", "strides"])
def test_refuses_what_does_not_fit(impl, wrong):
    x, *rest = operands(12, 16, 40)
    changed = {
        "dtype": x.double(),
        "two dtypes": x.bfloat16(),
        "width": x[:, :8].contiguous(),
        "strides": x.T.contiguous().T,
    }
    with pytest.raises(RuntimeError, match="mlp: "):
        kernel(changed[wrong], *rest)


def test_refuses_bfloat16_where_the_cpu_does_not_multiply_it(impl):
    given = operands(3, 4, 5, dtype=torch.bfloat16)
    if torch.bfloat16 in DTYPES:
        assert kernel(*given).dtype == torch.bfloat16
    else:
        with pytest.raises(RuntimeError, match=r"mlp: .*AVX512-BF16"):
            kernel(*given)
