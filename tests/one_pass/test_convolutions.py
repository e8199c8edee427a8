"""Tests convolutions of every kind that torch has, with PEFT's adapters on them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adapted_models import adapt, assert_equal, loop, save
from torch import nn

import fastcss

pytestmark = pytest.mark.filterwarnings("ignore:.*Merging is not supported", "ignore:.*merging LoRA weights won't")
CONVOLUTIONS = {
    "one pixel, dilated": {"kernel_size": 1, "dilation": 2, "stride": 2},
    "same size, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
    "same size, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "dilated along a side of one pixel": {"kernel_size": (1, 3), "dilation": (3, 1), "padding": (0, 1)},
    "grouped, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2, "padding_mode": "replicate"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular", "stride": (1, 2), "groups": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, **options)

    def forward(self, x):
        return self.conv(x)


def adapted(**options) -> peft.PeftModel:
    torch.manual_seed(0)
    sites = {"target_modules": ["conv"]}
    return adapt(Net(**options), {"r": 2, **sites}, {"r": 4, "lora_bias": True, **sites})


@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_a_convolution_as_peft_runs_it(name):
    model = adapted(**CONVOLUTIONS[name])
    runner = fastcss.one_pass(model)
    for x in (torch.randn(2, 4, 9, 9), torch.randn(4, 9, 9)):
        assert_equal(runner(x=x), loop(model, {"x": x}))


def test_a_dilated_convolution_that_peft_cannot_add_its_adapter_to():
    model = adapted(kernel_size=3, padding=2, dilation=2)
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.randn(2, 4, 9, 9))
    with pytest.raises(TypeError, match=r"'conv' is a convolution with dilation \(2, 2\).*padding='same'"):
        fastcss.one_pass(model)


@torch.no_grad()
def test_dense_b_of_grouped_convolutions_as_peft_saved_them_before_016(tmp_path):
    model = adapted(kernel_size=3, groups=2)
    layer = model.base_model.model.conv
    for name, rank in (("task0", 2), ("task1", 4)):  # the module that peft 0.15 makes
        layer.lora_B[name] = nn.Conv2d(rank, 6, 1, bias=layer.lora_bias[name])
    folders, x = save(model, tmp_path), torch.randn(2, 4, 9, 9)
    bare = Net(kernel_size=3, groups=2)
    bare.load_state_dict(copy.deepcopy(layer.base_layer).state_dict(prefix="conv."))
    assert_equal(fastcss.one_pass(model)(x=x), loop(model, {"x": x}))
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(x=x), loop(model, {"x": x}))
