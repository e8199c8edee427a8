"""Tests adapters that come and go while calls, or backward passes, of the runner are under way."""

from __future__ import annotations

import threading

import pytest
import torch
from adapted_models import EXACT, adapt, inputs, vit
from torch import nn

import fastcss

ENTERED, GO = threading.Event(), threading.Event()


class Pausing(nn.Module):
    """Pauses in the middle of its call, between two layers, until ``GO`` is set."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        ENTERED.set()
        assert GO.wait(30)
        return self.second(x)


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_a_change_waits_for_calls_under_way(engine):
    torch.manual_seed(0)
    model = adapt(Pausing(), *({"r": r, "target_modules": ["first", "second"]} for r in (1, 2, 3)))
    runner, x = fastcss.one_pass(model, engine=engine), torch.randn(2, 4)
    GO.set()
    runner(x)
    expected = runner(x)
    GO.clear()
    ENTERED.clear()
    found: list = []
    call = threading.Thread(target=lambda: found.append(runner(x)), daemon=True)
    call.start()
    assert ENTERED.wait(30)
    change = threading.Thread(target=lambda: runner.remove("task0"), daemon=True)
    change.start()
    change.join(0.1)
    assert change.is_alive()
    assert runner.adapters == ("task0", "task1", "task2")
    GO.set()
    for thread in (call, change):
        thread.join(30)
        assert not thread.is_alive()
    assert torch.equal(found[0], expected)
    assert runner.adapters == ("task1", "task2")
    torch.testing.assert_close(runner(x), expected[1:], atol=EXACT, rtol=0)


@torch.no_grad()
def test_no_change_inside_of_a_call():
    GO.set()
    model = adapt(Pausing(), *({"r": 2, "target_modules": ["first"]} for _ in range(2)))
    runner = fastcss.one_pass(model)
    hook = model.get_base_model().second.register_forward_hook(lambda *_: runner.remove("task0"))
    with pytest.raises(RuntimeError, match="inside of a call of their runner"):
        runner(torch.randn(2, 4))
    hook.remove()
    assert runner(torch.randn(2, 4)).shape == (2, 2, 4)
    runner.remove("task0")
    assert runner(torch.randn(2, 4)).shape == (1, 2, 4)


def test_backward_passes_to_come_keep_their_adapters():
    """A checkpointed layer computes again in the backward pass, with the adapter that its forward pass had."""
    torch.manual_seed(0)
    model = adapt(vit(), *({"r": 2, "target_modules": ["q_proj"]} for _ in range(3))).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given, gradients = inputs(vit), []
    for change in (False, True):
        runner = fastcss.one_pass(model, engine="replay")
        loss = runner(**given).last_hidden_state.pow(2).sum()
        if change:
            runner.remove("task0")
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=0, rtol=0)
