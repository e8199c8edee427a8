"""Where ``fuse`` may compute norm, MLP and residual of a layer in one kernel, which tests/ops/test_mlp.py tests."""

from __future__ import annotations

import left_out
import peft
import pytest
import torch
import torch.nn.functional as F
from fused_models import assert_equal
from sam_models import build_layer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcss
from fastcss._dispatch import backends
from fastcss._fuse import linear
from fastcss._fuse.mlp import DTYPES

pytestmark = left_out.points(
    lambda device: device == "cpu" and backends.why_not("cpu", torch.empty(0), "mlp") is None, "it is compiled for CPUs"
)


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


@pytest.mark.points(lambda: torch.bfloat16 in DTYPES, "the CPU multiplies bfloat16")
def test_bfloat16_runs_in_one_piece(layer):
    """It must be no further from the float64 layer than the layer's own bfloat16 is."""
    own, exact = build_layer("sam", 0).bfloat16(), build_layer("sam", 0).double()(X.bfloat16().double())
    assert runs_in_one_piece(layer.bfloat16(), X.bfloat16())
    got = layer(X.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() <= (own(X.bfloat16()) - exact).norm()


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
    "float16": lambda m: m.half(),
    "a norm in float32": lambda m: m.bfloat16().layer_norm2.float(),
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
