"""Tests models that write their own state in a call: what adds up does so for each adapter, a cache stays."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted_models import adapt, assert_equal, loop
from counting_model import counts, state
from torch import nn

import fastcss


@pytest.mark.parametrize("engine", ["auto", "replay", "vmap"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_adds_up_from_call_to_call_adds_up_for_each_adapter(engine, mode):
    model, x = counts()
    other = copy.deepcopy(model)
    runner = fastcss.one_pass(model, engine=engine)
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if engine == "vmap":
            with pytest.raises(RuntimeError, match="engine 'vmap' cannot run the model: what it writes"):
                runner(x)
            return
        for _ in range(2):
            assert_equal(runner(x), loop(other, {"x": x}))
            assert state(model) == state(other)
            assert (
                model.get_base_model().reassigned
                == other.get_base_model().reassigned
                == model.state_dict()["base_model.model.reassigned"]
            )
    assert runner.engine == "replay"


class Writes(nn.Module):
    """Counts its calls in one place."""

    def __init__(self, where):
        super().__init__()
        self.layer, self.where = nn.Linear(4, 4), where
        self.entries, self.listed, self.plain = {"n": 0}, [0], torch.zeros(())

    def forward(self, x):
        if self.where == "tensor":
            self.plain.add_(1)
        elif self.where == "dict":
            self.entries["n"] += 1
        else:
            self.listed[0] += 1
        return self.layer(x) * (1 + self.plain + self.entries["n"] + self.listed[0])


@pytest.mark.parametrize("first", [["task0"], None], ids=["one adapter first", "all"])
@pytest.mark.parametrize("where", ["tensor", "dict", "list"])
@torch.no_grad()
def test_what_adds_up_in_attributes(where, first):
    model, x = adapt(Writes(where), *({"r": 2, "target_modules": ["layer"]} for _ in range(3))), torch.randn(2, 4)
    other, runner = copy.deepcopy(model), fastcss.one_pass(model)
    if first:
        runner(x, adapters=first)
        other(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert_equal(runner(x), loop(other, {"x": x}))


class Caches(nn.Module):
    """Fills a table when it is first asked for, and a buffer in every call, alike for every adapter."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(4, 4), None
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("places", torch.zeros(0))

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4.0)
        if len(self.places) < len(x):
            self.places = torch.arange(float(len(x)))
        self.mean.copy_(x.mean(0))
        return self.layer(x) * self.table + self.mean + self.places[: len(x), None]


@torch.no_grad()
def test_what_a_model_caches_stays_under_vmap():
    torch.manual_seed(0)
    model = adapt(Caches(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = fastcss.one_pass(model, engine="auto")
        for batch in (2, 3, 2):
            x = torch.randn(batch, 4)
            assert_equal(runner(x), loop(other, {"x": x}))
            assert torch.equal(model.get_base_model().places, other.get_base_model().places)
    assert runner.engine == "vmap"
