"""Tests what is around a model (PEFT's wrapper, a compiler, another runner), and what attributes and outputs hold."""

from __future__ import annotations

import types
import warnings

import numpy as np
import peft
import pytest
import torch
from adapted_models import EXACT, adapt, build_adapted, inputs, loop, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastcss


class Small(nn.Module):
    """Has two layers; the values of its attributes decide its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.array = np.ones(1, dtype=np.float32)
        self.options, self.named, self.listed = types.SimpleNamespace(by=1.0), {"by": 1.0}, [{"by": 1.0}]

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        x = x * torch.from_numpy(self.array)
        return x * self.options.by * self.named["by"] * self.listed[0]["by"]


class WithNumber(Small):
    def forward(self, x):
        x = super().forward(x)
        return {"out": x, "number": x.sum().item()}


SITES = {"target_modules": ["first", "second"], "r": 2}


def small(build=Small, **options):
    torch.manual_seed(0)
    return adapt(build(), {**SITES, **options}, {**SITES, **options}), torch.randn(3, 4)


def peft_loop(model, x):
    outs = []
    for name in list(model.peft_config):
        model.set_adapter(name)
        outs.append(model(x))
    return torch.stack(outs)


def assert_as_peft(runner, model, x):
    torch.testing.assert_close(runner(x), peft_loop(model, x), atol=EXACT, rtol=0)


# --- around the model ----------------------------------------------------------------------------------------------


def _hook(model):
    model.register_forward_hook(lambda m, a, out: out)


def _backward_hook(model):
    model.register_full_backward_hook(lambda m, gi, go: None)


def _replace_forward(model):
    model.forward = lambda *args: peft.PeftModel.forward(model, *args) * 2


def _subclass(model):
    model.__class__ = type("Mine", (type(model),), {"forward": lambda self, x: x})


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", [_hook, _backward_hook, _replace_forward, _subclass])
def test_what_the_peft_model_itself_adds_is_refused(change, late):
    model, x = small()
    runner = fastcss.one_pass(model)
    change(model)
    with pytest.raises(TypeError, match=r"around the model has hooks or a replaced forward.*get_base_model"):
        runner(x) if late else fastcss.one_pass(model)


@torch.no_grad()
def test_hooks_for_all_modules_are_refused():
    model, x = small()
    runner = fastcss.one_pass(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        with pytest.raises(TypeError, match="hook for all modules"):
            runner(x)
    finally:
        handle.remove()
    with FlopCounterMode(display=False):  # which has one of torch's own
        assert_as_peft(runner, model, x)


@pytest.mark.parametrize("what", ["PEFT model", "base model", "runner", "function"])
@torch.no_grad()
def test_compiled(what):
    if what == "base model":
        model, x = adapt(torch.compile(Small(), backend="eager"), SITES, SITES), torch.randn(3, 4)
    else:
        model, x = small()
    runner = fastcss.one_pass(torch.compile(model, backend="eager") if what == "PEFT model" else model)
    called = {
        "runner": torch.compile(runner, backend="eager"),
        "function": torch.compile(lambda x: runner(x) + 0, backend="eager"),
    }.get(what, runner)
    assert_as_peft(called, model, x)
    next(p for name, p in model.named_parameters() if "first.lora_B.task1" in name).data.mul_(-2)
    assert_as_peft(called, model, x)


def test_traced():
    model, x = small()
    traced = torch.jit.trace(fastcss.one_pass(model, engine="replay"), x, check_trace=False)
    assert_as_peft(traced, model, torch.randn(3, 4))


@pytest.mark.parametrize("target", ["first", "second"])
@torch.no_grad()
def test_vmapped_from_outside(target):
    """The first layer's input has only the outer axis if the second layer is the first one with adapters."""
    model, x = small(target_modules=[target])
    runner, batches = fastcss.one_pass(model, engine="vmap"), torch.stack([x, -x, x.flip(0)])
    wanted = torch.stack([peft_loop(model, batch) for batch in batches])
    torch.testing.assert_close(torch.vmap(runner)(batches), wanted, atol=EXACT, rtol=0)


class Differentiates(Small):
    def forward(self, x):
        return self.second(torch.relu(torch.func.grad(lambda x: self.first(x).square().sum())(x)).repeat(1, 2)[:, :6])


@torch.no_grad()
def test_a_model_that_differentiates_itself_runs_in_turn():
    model, x = small(Differentiates)
    runner = fastcss.one_pass(model)
    with pytest.warns(UserWarning, match="Differentiates does not run under vmap.*torch.func"):
        assert_as_peft(runner, model, x)
    assert runner.engine == "replay"


def test_runners_of_runners_are_refused_by_name():
    runner = fastcss.one_pass(small()[0])
    with pytest.raises(TypeError, match="the model is a runner itself"):
        fastcss.one_pass(runner)
    with pytest.raises(TypeError, match="1 is a runner itself"):
        fastcss.one_pass(nn.Sequential(nn.Linear(2, 2), runner))


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        fastcss.one_pass(small()[0])._replicate_for_data_parallel()


# --- what attributes hold ------------------------------------------------------------------------------------------


def _in_an_object(base):
    base.options.by = 2.0


def _in_a_dict(base):
    base.named["by"] = 2.0


def _in_a_dict_in_a_list(base):
    base.listed[0]["by"] = 2.0


def _in_an_array(base):
    base.array[:] = 2.0


def _another_dict_of_scales(base):
    base.first.scaling = dict.fromkeys(base.first.scaling, 9.0)


def _a_scale_in_place(base):  # as hotswap_adapter does after prepare_model_for_compiled_hotswap
    base.second.scaling["task1"].fill_(5.0)


@pytest.mark.parametrize(
    "change",
    [_in_an_object, _in_a_dict, _in_a_dict_in_a_list, _in_an_array, _another_dict_of_scales, _a_scale_in_place],
)
@torch.no_grad()
def test_changes_inside_of_attributes_are_seen(change):
    model, x = small()
    base = model.get_base_model()
    base.second.scaling["task1"] = torch.tensor(3.0)
    runner = fastcss.one_pass(model)
    before = runner(x)
    change(base)
    assert (peft_loop(model, x) - before).abs().max() > 0.01
    assert_as_peft(runner, model, x)


def test_an_unchanged_model_keeps_its_copy():
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model)
    model_copy = runner._model_copy
    loop(model, given)
    runner(**given)
    assert runner._model_copy is model_copy


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@torch.no_grad()
def test_dropout_layers_have_a_mode_of_their_own(late):
    """Dropout switched off in training, and on in evaluation, as is done for both kinds of inference."""
    model, x = small(lora_dropout=0.9)
    runner = fastcss.one_pass(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_peft(runner if late else fastcss.one_pass(model), model, x)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        runner = runner if late else fastcss.one_pass(model)
        assert (runner(x) - runner(x)).abs().max() > 0.1


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 1])
@torch.no_grad()
def test_plain_values_that_differ_between_adapters_are_refused(group_size):
    model, x = small(WithNumber)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="plain value that differs between the adapters"):
            fastcss.one_pass(model, group_size=group_size)(x)
        one = fastcss.one_pass(model)(x, adapters=["task1"])
    model.set_adapter("task1")
    assert one["number"] == pytest.approx(model(x)["number"], abs=1e-4)


@torch.no_grad()
def test_adapters_by_any_iterable():
    model, x = small()
    runner = fastcss.one_pass(model)
    got = runner(x, adapters=iter(["task1"]))
    torch.testing.assert_close(got, runner(x)[1:], atol=EXACT, rtol=0)
