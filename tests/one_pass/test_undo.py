"""Tests what a failed run under vmap leaves behind, and when it decides which engine runs from then on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted_models import adapt, assert_equal, loop
from counting_model import counts, state
from torch import nn

import fastcss


def splitting_bound(model, x) -> float:
    layer = copy.deepcopy(model)
    sums = []
    for name in layer.peft_config:
        layer.set_adapter(name)
        sums.append(float(layer.get_base_model().layer(x).sum()))
    low, *_, high = sorted(sums)
    return (low + high) / 2


@pytest.mark.parametrize("how", [None, "once"])
@pytest.mark.parametrize("calls_before", [0, 2])
@torch.no_grad()
def test_a_failed_run_is_undone(calls_before, how):
    """A run may fail in the first call or after calls that vmap ran: the model must hold what the loop writes."""
    model, x = counts()
    runner = fastcss.one_pass(model, group_size=3)
    for _ in range(calls_before):
        runner(x, "quiet")
    assert runner.engine == "vmap"
    ours = runner._model_copy.model  # Python state is the copy's
    ours.bound = model.get_base_model().bound = splitting_bound(model, x)
    other = copy.deepcopy(model)
    theirs = other.get_base_model()
    theirs.steps, theirs.history, theirs.reassigned = ours.steps, list(ours.history), ours.reassigned.clone()
    theirs.nested = copy.deepcopy(ours.nested)
    with pytest.warns(UserWarning, match="differs between the tasks"):
        got = runner(x, how)
    assert_equal(got, loop(other, {"x": x, "how": how}))
    assert state(model) == state(other)
    assert (ours.steps, ours.history) == (theirs.steps, theirs.history)


@torch.no_grad()
def test_what_cannot_be_undone_is_refused():
    """A write past torch's functions, to a buffer that no earlier call wrote, must be refused."""
    model, x = counts()
    runner = fastcss.one_pass(model, group_size=3)
    runner(x, "quiet")
    runner._model_copy.model.bound = splitting_bound(model, x)
    with pytest.raises(RuntimeError, match=r"of the model or an input, \[2, 4\], which cannot be put back.*replay"):
        runner(x, "unseen")


class Fails(nn.Module):
    """Raises when it is told to."""

    def __init__(self):
        super().__init__()
        self.layer, self.left = nn.Linear(4, 4), [0]

    def forward(self, x, each_time=False):
        y = self.layer(x)
        if each_time or (self.left[0] and self.left.__setitem__(0, self.left[0] - 1) is None):
            raise RuntimeError("the camera is busy")
        return y


@torch.no_grad()
def test_an_error_that_passes_changes_no_engine():
    torch.manual_seed(0)
    module, x = Fails(), torch.randn(2, 4)
    model = adapt(module, *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    left = module.left = _Shared([0])
    runner, expected = fastcss.one_pass(model), loop(model, {"x": x})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # three times, but never twice in a row
            left[0] = 1
            assert_equal(runner(x), expected)
            assert_equal(runner(x), expected)
            with pytest.raises(RuntimeError, match="the camera is busy"):
                runner(x, each_time=True)
    assert runner.engine == "vmap"
    left[0] = 1
    runner(x)
    left[0] = 1
    with pytest.warns(UserWarning, match="the camera is busy .twice under vmap, and not in turn"):
        assert_equal(runner(x), expected)
    assert runner.engine == "replay"


class Keeps(nn.Module):
    """Uses what its last call left; one that is interrupted leaves what it should not."""

    def __init__(self):
        super().__init__()
        self.layer, self.left = nn.Linear(4, 4), None

    def forward(self, x, interrupt=None):
        y = self.layer(x)
        if self.left is not None:
            y, self.left = y + self.left, None
        if interrupt is not None:
            self.left = y
            raise interrupt
        return y


@pytest.mark.parametrize("error", [TypeError("no such option"), KeyboardInterrupt()])
@pytest.mark.parametrize("engine", ["auto", "vmap"])
@torch.no_grad()
def test_whatever_ends_a_run_is_undone(error, engine):
    model, x = adapt(Keeps(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3))), torch.randn(2, 4)
    runner, expected = fastcss.one_pass(model, engine=engine, group_size=3), loop(model, {"x": x})
    with pytest.raises(type(error)):
        runner(x, error)
    assert_equal(runner(x), expected)


class _Shared(list):
    """Stands for the world outside of a model: a copy of the model has no copy of this, and nothing undoes it."""

    def __deepcopy__(self, memo):
        return _World(self)


class _World:
    __slots__ = ("shared",)

    def __init__(self, shared):
        self.shared = shared

    def __getitem__(self, i):
        return self.shared[i]

    def __setitem__(self, i, value):
        self.shared[i] = value
