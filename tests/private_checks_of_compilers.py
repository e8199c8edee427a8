"""Checks what the package uses of compilers, Triton and transformers and is private there."""

from __future__ import annotations

import pytest
import torch
from private_checks_of_torch import of
from torch import nn

import fastcss  # noqa: F401  defines the ops
from fastcss._dispatch import private_apis as apis


@of("compiled_from", "one_pass of a compiled model")
@of("dynamo_is_loaded", "one_pass of a model that compiles parts of itself")
def _():
    layer = nn.Linear(2, 2)
    assert apis.compiled_from(layer) is None
    assert apis.compiled_from(torch.compile(layer, backend="eager")) is layer
    assert apis.dynamo_is_loaded()


@of("is_one_graph", "torch.compile(fullgraph=True) of a runner")
def _():
    for whole in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: x + apis.is_one_graph(), backend="eager", fullgraph=whole)
        assert compiled(torch.zeros(())) == whole


_doubled = apis.traced_as_one(lambda layer, x: layer(x) * 2)


@of("traced_as_one", "torch.compile(fullgraph=True) of a runner")
def _():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    got = torch.compile(lambda x: _doubled(layer, x), backend="aot_eager", fullgraph=True)(x)
    got.sum().backward()
    assert torch.equal(got, layer(x) * 2)
    assert torch.equal(layer.weight.grad, torch.full((2, 2), 2.0))


@of("modules_themselves", "torch.export of a runner whose model has a module by two names")
def _():
    seen = []

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.Linear(2, 2)

        def forward(self, x):
            seen.append(type(model.one) is nn.Linear)
            with apis.modules_themselves():
                seen.append(type(model.one) is nn.Linear)
            return self.two(self.one(x))

    model = Twice()
    torch.export.export(model, (torch.ones(1, 2),))
    assert seen == [False, True]
    assert type(model.one) is nn.Linear


@of("gpu_architecture", "the choice of tiles in Triton's kernels")
def _():
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        assert apis.gpu_architecture() == 10 * major + minor
    else:
        assert callable(triton.runtime.driver.__class__.active.fget)


@of(
    "CHECKPOINT_FUNCTION",
    "gradient checkpointing: a layer would be computed again with another adapter",
)
def _():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    model.gradient_checkpointing_enable()
    assert any(apis.CHECKPOINT_FUNCTION in vars(module) for module in model.modules())
