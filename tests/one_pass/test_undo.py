"""Tests what a failed run under vmap leaves behind, and when it decides which engine runs from then on."""

from __future__ import annotations

import copy
import random
import types
import warnings

import pytest
import torch
from adapted_models import adapt, assert_equal, loop
from torch import nn

import fastcss


class Counts(nn.Module):
    """Counts its calls in every way there is, then branches on a value in which adapters differ."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("reassigned", torch.zeros(()))
        self.register_buffer("means", torch.zeros(2, 4))
        self.no_buffer, self.in_a_list = torch.zeros(()), [torch.zeros(3)[1:]]
        self.steps, self.history, self.bound = 0, [], -1e9
        self.nested = {"history": [], "count": types.SimpleNamespace(calls=0)}

    def forward(self, x, how=None):
        step = int(how != "quiet")  # else it writes what is there already, which is no reason against vmap
        self.calls.add_(step)
        self.no_buffer += step
        self.in_a_list[0].add_(step)
        self.reassigned = self.reassigned + step
        self.steps += step
        self.history += [self.steps] * step
        self.nested["history"] += [self.steps] * step
        self.nested["count"].calls += step
        if how == "once":  # not in the calls before, so that nobody expects it
            self.means[0].add_(1)
        elif how == "unseen":
            torch.ops.aten.add_.Tensor(self.means, torch.ones(()))
        y = self.layer(x)
        if y.sum() > self.bound:
            y = y * self.calls + self.no_buffer * self.in_a_list[0].sum()
            y = y + len(self.nested["history"]) * self.nested["count"].calls
            return y + self.reassigned + self.steps + len(self.history) + self.means.sum()
        return y - self.calls


def counts():
    torch.manual_seed(0)
    model = adapt(Counts(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    return model, torch.randn(2, 4)


def splitting_bound(model, x) -> float:
    layer = copy.deepcopy(model)
    sums = []
    for name in layer.peft_config:
        layer.set_adapter(name)
        sums.append(float(layer.get_base_model().layer(x).sum()))
    low, *_, high = sorted(sums)
    return (low + high) / 2


def state(model) -> tuple:
    base = model.get_base_model()
    return base.calls.item(), base.means.tolist(), base.no_buffer.item(), base.in_a_list[0].tolist()


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


# --- reading a value of several numbers -------------------------------------------------------------------------------


class Reads(nn.Module):
    def __init__(self, read, size):
        super().__init__()
        self.layer, self.read, self.size = nn.Linear(4, 4), read, size

    def forward(self, x):
        y = self.layer(x).long()
        self.read(y.flatten()[: self.size] if self.size else y)
        return y


@pytest.mark.parametrize("size", [0, 2, None], ids=["none", "two", "a matrix"])
@pytest.mark.parametrize("read", [bool, float, int, torch.Tensor.item, torch.is_nonzero, [1, 2].__getitem__])
@torch.no_grad()
def test_several_numbers_are_no_number(read, size):
    torch.manual_seed(0)
    size = {0: -8}.get(size, size)
    model = adapt(Reads(read, size), *({"r": 2, "target_modules": ["layer"]} for _ in range(2)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()  # so that the adapters agree
    with pytest.raises((RuntimeError, TypeError, ValueError)) as own:
        model(torch.zeros(2, 4))
    for engine in ("vmap", "auto"):
        with pytest.raises(type(own.value)) as got:
            fastcss.one_pass(model, engine=engine)(torch.zeros(2, 4))
        assert str(got.value) == str(own.value)


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


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x), x * random.random()


@torch.no_grad()
def test_outputs_that_no_adapter_touches_may_differ_from_run_to_run():
    model, x = adapt(Draws(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3))), torch.randn(2, 4)
    runner = fastcss.one_pass(model, engine="replay")
    random.seed(0)
    got = runner(x)
    random.seed(0)
    assert_equal(got, loop(model, {"x": x}))
