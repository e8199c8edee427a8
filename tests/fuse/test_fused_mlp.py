"""Norm, MLP and residual of a layer in one kernel, against float64, and where ``fuse`` may use it."""

from __future__ import annotations

import left_out
import peft
import pytest
import torch
import torch.nn.functional as F
from fused_models import assert_equal, assert_same_bits
from sam_models import build_layer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastcss
from fastcss._dispatch import backends
from fastcss._fuse import linear

pytestmark = left_out.points(
    lambda device: device == "cpu" and backends.why_not("cpu", torch.empty(0), "mlp") is None, "it is compiled for CPUs"
)
EPS = 1e-6


def operands(rows: int, width: int, hidden: int, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    biases = [torch.randn(n, generator=generator) if bias else None for n in (hidden, width)]
    norm = torch.randn(2, width, generator=generator)
    x = 3 * torch.randn(rows, width, generator=generator) + 5
    return [x, *norm, normal(hidden, width), biases[0], normal(width, hidden), biases[1]]


def kernel(x, norm_weight, norm_bias, *layers) -> Tensor:
    return torch.ops.fastcss.mlp.cpu(x, norm_weight, norm_bias, EPS, *layers)


def by_torch(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2) -> Tensor:
    normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, EPS)
    return x + F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes", [(0, 8, 8), (1, 1, 1), (1, 16, 32), (12, 7, 33), (37, 48, 100), (300, 50, 7), (70, 600, 1100)], ids=str
)
def test_equals_float64(sizes, bias):
    given = operands(*sizes, bias)
    exact = by_torch(*(None if x is None else x.double() for x in given))
    error, allowed = ((f(*given) - exact).norm() for f in (kernel, by_torch))
    assert error <= 1.5 * allowed + 3e-7 * exact.norm()


def test_gelu():
    """The function itself, by the bias of one hidden unit: in its tails, at its turn, and beyond the numbers."""
    inf, nan = float("inf"), float("nan")
    values = torch.cat([torch.linspace(-14, 14, 561), torch.tensor([1e-30, -1e-30, -3e38, 3e38, inf, -inf, nan])])
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    got = torch.cat([kernel(zero, one[0], zero[0], zero, value[None], one, None)[0] for value in values])
    own, exact = F.gelu(values), F.gelu(values.double())
    assert got[-1].isnan()
    assert torch.equal(got[-4:-2], values[-4:-2])  # torch's own float32 makes inf of 3e38, and NaN of inf
    finite = values.abs() <= 14
    error, allowed = ((x - exact)[finite].abs().max() for x in (got, own))
    assert error <= allowed + 1e-7
    tails = values.abs() <= 5
    assert ((got - exact).abs() <= 3e-6 * exact.abs() + 1e-37)[tails].all()


def test_a_row_is_the_same_alone_and_on_any_number_of_threads():
    given = operands(333, 64, 200)
    expected = kernel(*given)
    rows = (0, 11, 12, 200, 332)
    for row in rows:
        assert_same_bits(kernel(given[0][row : row + 1], *given[1:])[0], expected[row])
    torch.set_num_threads(2)
    try:
        assert_same_bits(kernel(*given), expected)
    finally:
        torch.set_num_threads(1)


def test_flops_are_counted():
    given = operands(12, 16, 40)
    with FlopCounterMode(display=False) as counter:
        kernel(*given)
    assert counter.get_total_flops() == 2 * 2 * 12 * 16 * 40


@pytest.mark.parametrize("wrong", ["dtype", "width", "strides"])
def test_refuses_what_does_not_fit(wrong):
    x, *rest = operands(12, 16, 40)
    x = {"dtype": x.double(), "width": x[:, :8].contiguous(), "strides": x.T.contiguous().T}[wrong]
    with pytest.raises(RuntimeError, match="mlp: "):
        kernel(x, *rest)


# -------------------------------------------------------------------------------------------------------------- fuse


class Calls(TorchDispatchMode):
    """Counts the kernel's calls."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.fastcss.mlp.cpu
        return func(*args, **(kwargs or {}))


def runs_in_one_piece(layer: nn.Module, x: Tensor) -> bool:
    with Calls() as calls:
        layer(x)
    return calls.count == 1


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    layer = build_layer("sam", 0).requires_grad_(False)
    fastcss.fuse(layer)
    return layer


X = torch.randn(2, 10, 10, 16, generator=torch.Generator().manual_seed(0))


def test_runs_in_one_piece(layer):
    expected = build_layer("sam", 0)(X)
    assert runs_in_one_piece(layer, X)
    assert_equal(layer(X), expected.detach())
    columns_first = X.transpose(1, 2).contiguous().transpose(1, 2)
    assert runs_in_one_piece(layer, columns_first)
    assert_equal(layer(columns_first), expected.detach())


def _hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(lambda *_: None)


def _of_subclass(module: nn.Module) -> None:
    module.__class__ = type("Own", (type(module),), {})


CHANGES = {
    **{
        f"hook on {name}": lambda m, name=name: _hook(m, name) for name in ("layer_norm2", "mlp", "mlp.act", "mlp.lin2")
    },
    "own MLP": lambda m: _of_subclass(m.mlp),
    "another activation": lambda m: setattr(m.mlp, "act", nn.GELU(approximate="tanh")),
    "an activation in Python": lambda m: setattr(m.mlp.act, "act", m.mlp.act._gelu_python),
    "a layer not replaced": lambda m: setattr(m.mlp, "lin1", nn.Linear(16, 32)),
    "bfloat16": lambda m: m.bfloat16(),
    "gradients": lambda m: m.mlp.lin1.weight.requires_grad_(),
    "adapters": lambda m: peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lin1"]), m),
}


@pytest.mark.parametrize("change", CHANGES)
def test_runs_in_pieces(change, layer):
    CHANGES[change](layer)
    with torch.set_grad_enabled(change == "gradients"):
        assert not runs_in_one_piece(layer, X.to(layer.mlp.lin2.weight.dtype))


def test_modes_see_torch_calls(layer):
    class Watch(TorchFunctionMode):
        gelus = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.gelus += func is F.gelu
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        layer(X)
    assert watch.gelus == 1
    expected = layer(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_in_one_piece(layer, X)
    assert_equal(torch.vmap(layer)(X[:, None])[:, 0], expected)
