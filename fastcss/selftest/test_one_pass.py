"""Compares one_pass with PEFT's loop over the adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcss

EXACT = 1e-5  # float32, largest absolute difference: the sums are the loop's in another order


class Tiny(nn.Module):
    """Has one layer of each of two kinds that adapters sit on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, stride=2)
        self.head = nn.Linear(9, 5)

    def forward(self, picture):
        return self.head(self.stem(picture).relu().flatten(2).mT)


@torch.no_grad()
def test_one_pass_is_the_loop_over_the_adapters():
    peft = pytest.importorskip("peft", reason="the loop is PEFT's: pip install 'fastcss[peft]'")
    torch.manual_seed(0)
    config = {"target_modules": ["stem", "head"], "init_lora_weights": False}
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=4, **config), adapter_name="task0").eval()
    model.add_adapter("task1", peft.LoraConfig(r=3, lora_alpha=5, **config))
    picture = torch.randn(2, 3, 11, 13)
    want = []
    for name in model.peft_config:
        model.set_adapter(name)
        want.append(model(picture))
    assert (want[0] - want[1]).abs().max() > 0.1
    torch.testing.assert_close(fastcss.one_pass(model)(picture), torch.stack(want), atol=EXACT, rtol=0)
