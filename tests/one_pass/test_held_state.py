"""Tests models whose modules hold more than modules and tensors: lists, dicts, objects, functions that share them."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest
import torch
from adapted_models import adapt, assert_equal, build_adapted, clip_text, inputs, loop, regnet, vit
from torch import nn

import fastcss


class Factor(nn.Module):
    """Multiplies by what it holds; its class says how it is copied."""

    def __init__(self):
        super().__init__()
        self.by = 2.0

    def __getstate__(self):
        return dict(vars(self))

    def forward(self, x):
        return x * self.by * (0.5 if self.training else 1.0)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act, self.factor = nn.Linear(4, 4), nn.Tanh(), Factor()
        self.table, self.steps, self.known = {"a": [1.0]}, [1.0], {1.0}
        self.array = np.ones(4, dtype=np.float32)
        self.options = types.SimpleNamespace(by=1.0, more=types.SimpleNamespace(by=1.0))

    def forward(self, x):
        by = self.table["a"][-1] * self.steps[0] * sum(self.known) * self.options.by * self.options.more.by
        self.options.mean = x.mean()
        return self.factor(self.act(self.layer(x) * by * torch.from_numpy(self.array)))


def held():
    torch.manual_seed(0)
    return adapt(Holds(), *({"r": 2, "target_modules": ["layer"]} for _ in range(2))), {"x": torch.randn(3, 4)}


CHANGES = {
    "an entry of a list": lambda m: m.steps.__setitem__(0, 3.0),
    "a list in a dict": lambda m: m.table["a"].append(3.0),
    "an entry of a dict": lambda m: m.table.update(a=[3.0]),
    "a set": lambda m: m.known.add(3.0),
    "an array": lambda m: m.array.__setitem__(slice(None), 3.0),
    "an object": lambda m: setattr(m.options, "by", 3.0),
    "an object in an object": lambda m: setattr(m.options.more, "by", 3.0),
    "the attribute of a module that copies itself": lambda m: setattr(m.factor, "by", 3.0),
    "the mode of a module that copies itself": lambda m: m.train(),
}


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_what_modules_hold_is_followed(what):
    model, given = held()
    runner = fastcss.one_pass(model)
    before = runner(**given)
    CHANGES[what](model.get_base_model())
    got = runner(**given)  # before the loop, which changes what the model holds as well
    assert not torch.allclose(got[0], before[0], atol=1e-2)
    assert_equal(got, loop(model, given))


@pytest.mark.parametrize("build", [vit, clip_text, regnet])
@torch.no_grad()
def test_a_loop_over_the_adapters_wants_no_new_copy(build):
    model, given = build_adapted(build), inputs(build)
    runner = fastcss.one_pass(model)
    model_copy = runner._model_copy
    assert_equal(runner(**given), loop(model, given))
    assert_equal(runner(**given), loop(model, given))
    assert runner._model_copy is model_copy


def through_a_closure(options):
    return lambda module, args, output: output * options.mean


def through_a_partial(options):
    return functools.partial(lambda by, module, args, output: output * by[0].mean, [options])


def through_a_default(options):
    def hook(module, args, output, by=options):
        return output * by.mean

    return hook


@pytest.mark.parametrize("hook", [through_a_closure, through_a_partial, through_a_default])
@torch.no_grad()
def test_a_hook_reads_what_the_forward_has_left_for_it(hook):
    """Both know one object: the hook refers to the user's own, so the copy must use that, too."""
    model, given = held()
    base = model.get_base_model()
    base.options.mean = None
    base.act.register_forward_hook(hook(base.options))
    assert_equal(fastcss.one_pass(model, engine="replay")(**given), loop(model, given))


@torch.no_grad()
def test_a_hook_reads_a_list_that_the_forward_writes():
    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.log = nn.Linear(4, 4), [1.0]

        def forward(self, x):
            self.log.append(self.log[-1] + 1)
            return self.layer(x)

    torch.manual_seed(0)
    model, x = adapt(Logs(), *({"r": 2, "target_modules": ["layer"]} for _ in range(2))), torch.randn(2, 4)
    log = model.get_base_model().log
    model.get_base_model().register_forward_hook(lambda module, args, output: output * log[-1])
    expected = loop(model, {"x": x})
    del log[1:]
    assert_equal(fastcss.one_pass(model, engine="replay")(x), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 1)], ids=["linear", "conv"])
@torch.no_grad()
def test_the_mode_of_an_adapters_dropout_is_its_own(layer):
    """It may be off while the model trains, and on (MC dropout) while the model is in eval mode."""
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["0"], "lora_dropout": 0.5}
    model = adapt(nn.Sequential(layer), config, config)
    given = {"input": torch.randn(3, 4) if isinstance(layer, nn.Linear) else torch.randn(1, 4, 5, 5)}
    runner = fastcss.one_pass(model)
    model.train()
    model.get_base_model()[0].lora_dropout.eval()
    assert_equal(runner(**given), loop(model, given))
    model.eval()
    model.get_base_model()[0].lora_dropout["task1"].train()
    first, second = runner(**given), runner(**given)
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-2)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("around", ["PeftModel", "LoraModel"])
@pytest.mark.parametrize("how", ["hook", "forward"])
@torch.no_grad()
def test_hooks_around_the_model_are_refused(how, around, late):
    """PEFT's wrappers do not run in one pass, so that neither would what is on them."""
    model, given = build_adapted(vit), inputs(vit)
    module = model if around == "PeftModel" else model.base_model
    runner = fastcss.one_pass(model) if late else None
    if how == "hook":
        module.register_forward_hook(lambda module, args, output: None)
    else:
        module.forward = functools.partial(module.forward)
    with pytest.raises(TypeError, match=f"the {around} around the model has hooks or a replaced.*get_base_model"):
        fastcss.one_pass(model)
    if late:
        with pytest.raises(TypeError, match=around):
            runner(**given)
