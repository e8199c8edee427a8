"""Tests a runner as a module: copied, pickled, averaged, moved, trained by others' loops."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from adapted_models import EXACT, adapt, assert_equal, build_adapted, inputs, loop, vit
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastcss


def through_torch(runner):
    file = io.BytesIO()
    torch.save(runner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(runner):
    return pickle.loads(pickle.dumps(runner))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
@torch.no_grad()
def test_a_copy_has_a_model_of_its_own(duplicate):
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model, engine="replay", group_size=2, fuse=False)
    before = runner(**given)
    other = duplicate(runner)
    assert repr(other) == repr(runner)
    assert (other.group_size, other.fusion) == (2, None)
    for parameter in model.parameters():
        parameter.mul_(1.3)
    assert_equal(other(**given), loop(other.model, given))
    torch.testing.assert_close(other(**given)[0], before[0], atol=EXACT, rtol=0)
    assert_equal(runner(**given), loop(model, given))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@torch.no_grad()
def test_a_copy_of_a_runner_of_folders(duplicate, tmp_path):
    model, given = build_adapted(vit), inputs(vit)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    runner = fastcss.one_pass.from_directories(vit().eval(), [tmp_path / "task2", tmp_path / "task0"])
    assert_equal(duplicate(runner)(**given), loop(model, given, ["task2", "task0"]))


def test_a_runner_is_a_module_with_the_model_in_it():
    model = build_adapted(vit)
    runner = fastcss.one_pass(model)
    assert isinstance(runner, nn.Module)
    assert list(runner.children()) == [model]
    assert {id(p) for p in runner.parameters()} == {id(p) for p in model.parameters()}
    assert list(runner.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    runner.train()
    assert model.training
    assert runner._model_copy.follow()
    assert runner._model_copy.training
    runner.eval().to(torch.float64)
    given = {name: t.double() for name, t in inputs(vit).items()}
    with torch.no_grad():
        assert_equal(runner(**given), loop(model, given))


@torch.no_grad()
def test_a_state_dict_there_and_back():
    model, other, given = build_adapted(vit), build_adapted(vit), inputs(vit)
    for parameter in other.parameters():
        parameter.mul_(1.2)
    runner, wanted = fastcss.one_pass(model), loop(other, given)
    runner(**given)
    state = {f"model.{name}": tensor for name, tensor in other.state_dict().items()}
    assert_equal(torch.func.functional_call(runner, state, (), given), wanted)
    assert_equal(runner(**given), loop(model, given))
    for assign in (False, True):
        runner.load_state_dict(state, assign=assign)
        assert_equal(runner(**given), wanted)
    assert all(torch.equal(tensor, state[name]) for name, tensor in runner.state_dict().items())


def test_hooks_of_the_runner_see_all_tasks():
    model, given, seen = build_adapted(vit), inputs(vit), []
    runner = fastcss.one_pass(model)
    runner.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"pixel_values": -kwargs["pixel_values"]}), with_kwargs=True
    )
    runner.register_forward_hook(lambda _, args, output: seen.append(output[0].shape))
    with torch.no_grad():
        assert_equal(runner(**given), loop(model, {"pixel_values": -given["pixel_values"]}))
    assert seen == [(3, 1, 17, 32)]
    assert runner.engine == "vmap"


@torch.no_grad()
def test_averaged_model():
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model)
    averaged = AveragedModel(runner)
    first = averaged(**given)
    averaged.update_parameters(runner)
    for parameter in model.parameters():
        parameter.mul_(1.2)
    averaged.update_parameters(runner)
    got = averaged(**given)
    assert not torch.equal(got[0], first[0])
    assert_equal(got, loop(averaged.module.model, given))


def test_what_cannot_be_pickled_says_which():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x)

    runner = fastcss.one_pass(adapt(Local(), {"r": 2, "target_modules": ["layer"]}))
    with pytest.raises((AttributeError, pickle.PicklingError), match="Local"):
        pickle.dumps(runner)


def test_a_training_step_by_an_optimizer_of_the_runner():
    model, given = build_adapted(vit), inputs(vit)
    model.set_requires_grad(["task0", "task1", "task2"])
    runner = fastcss.one_pass(model).train()
    optimizer = torch.optim.SGD(runner.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(**given).last_hidden_state.square().sum().backward()
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert all(any(f"lora_B.{task}" in name for name in moved) for task in runner.adapters)
    runner.eval()
    with torch.no_grad():
        assert_equal(runner(**given), loop(model, given))
