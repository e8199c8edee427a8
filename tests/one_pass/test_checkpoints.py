"""Tests gradient checkpointing: the backward pass must compute again what the forward pass computed."""

from __future__ import annotations

import pytest
import torch
from adapted_models import EXACT, adapt, build_adapted, inputs, vit
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcss


def train(model, *names: str) -> None:
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(wanted in name for wanted in names))


def gradients(model, losses) -> dict:
    for loss in losses:
        loss().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return got


@pytest.mark.filterwarnings("ignore:.*does not run under vmap")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpoints_equal_the_loop(reentrant):
    model, given = build_adapted(vit), inputs(vit)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    given["pixel_values"].requires_grad_()

    def of(name: str):
        model.set_adapter(name)
        train(model, "lora_", "norm")
        return model(**given).last_hidden_state.square().mean()

    expected = gradients(model, [lambda name=name: of(name) for name in ("task0", "task1", "task2")])
    runner = fastcss.one_pass(model)
    got = gradients(model, [lambda: runner(**given).last_hidden_state.square().mean((1, 2, 3)).sum()])
    assert runner.engine == "replay"
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=EXACT, rtol=0)
    with pytest.raises(RuntimeError, match="gradient checkpointing on"):
        fastcss.one_pass(model, engine="vmap")(**given)
    model.eval()
    assert runner(**given).last_hidden_state.shape[0] == 3


class Checkpoints(nn.Module):
    """Calls torch's checkpoint itself, so that nobody can tell which adapter it must compute again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda x: self.layer(x).relu(), x, use_reentrant=False)


@pytest.mark.parametrize("engine", ["vmap", "replay"])
def test_a_checkpoint_that_nobody_knows_of_is_refused(engine):
    model = adapt(Checkpoints(), *({"r": 2, "target_modules": ["layer"]} for _ in range(2)))
    train(model, "lora_")
    runner = fastcss.one_pass(model, engine=engine)
    with pytest.raises(RuntimeError, match=r"ran after its runner's call|vmap|functorch"):
        runner(torch.randn(3, 4)).sum().backward()
