"""Tests adapters that come and go while a runner runs: it then gives the bits of a runner that was built with them."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from adapted_models import (
    EXACT,
    adapt,
    assert_equal,
    assert_same_bits,
    assert_untouched,
    inputs,
    loop,
    save,
    state_of,
    vit,
)

import fastcss


def assert_as_new(runner, new, given, route=(1, -1, 0, 1)) -> None:
    """Check that ``runner`` goes on as ``new``, which was built with its adapters."""
    assert runner.adapters == new.adapters
    for _ in range(2):  # the first call of a size measures
        assert_same_bits(runner(**given), new(**given))
    assert_same_bits(runner(**given, adapters=new.adapters[::-1]), new(**given, adapters=new.adapters[::-1]))
    batch = {name: value[:1].repeat(len(route), *[1] * (value.dim() - 1)) for name, value in given.items()}
    route = torch.tensor(route)
    assert_same_bits(runner(**batch, route=route), new(**batch, route=route))


def read(bare, folders):
    return fastcss.one_pass.from_directories(bare, folders)


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_folders_come_and_go(four, engine):
    bare, model, folders = four
    given, before = inputs(vit, 2), state_of(bare)
    runner = fastcss.one_pass.from_directories(bare, folders[:2], engine=engine)
    runner(**given)
    held = runner._model_copy

    def new(*places):
        return fastcss.one_pass.from_directories(bare, [folders[place] for place in places], engine=engine)

    runner.add(folders[2])
    assert_as_new(runner, new(0, 1, 2), given)
    assert_equal(runner(**given), loop(model, given, ["task0", "task1", "task2"]))
    runner.remove("task0")
    assert_as_new(runner, new(1, 2), given)
    runner.add(str(folders[0]), name="again")
    runner.swap("task2", folders[3])
    assert runner.adapters == ("task1", "task2", "again")
    assert_equal(runner(**given), loop(model, given, ["task1", "task3", "task0"]))
    runner.remove("again")
    runner.remove("task1")
    assert runner._model_copy is held  # the model was not copied again
    assert_same_bits(runner(**given).last_hidden_state, new(3)(**given).last_hidden_state)
    assert_untouched(bare, before)


@torch.no_grad()
def test_a_models_own_adapters_come_and_go(four, tmp_path):
    _, model, folders = four
    given = inputs(vit, 2)
    runner = fastcss.one_pass(model)
    held = runner._model_copy
    model.load_adapter(folders[1], "late")
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"late now.*runner\.refresh\(\).*runner\.add\(name\)"):
        runner(**given)
    runner.add("late")
    assert_untouched(model, before)
    assert_as_new(runner, fastcss.one_pass(model), given)
    runner.remove("task1")  # stays in the model
    runner.remove("task0")
    names = ["task2", "task3", "late"]
    assert runner.adapters == tuple(names)
    assert_equal(runner(**given), loop(model, given, names))
    model.delete_adapter("task0")
    assert_equal(runner(**given), loop(model, given, names))
    runner.add("task1")
    model.delete_adapter("task3")
    runner.remove("task3")
    names = ["task2", "late", "task1"]
    assert_equal(runner(**given), loop(model, given, names))
    singles = [{"pixel_values": image[None]} for image in given["pixel_values"]]
    expected = [loop(model, *pair)[0].last_hidden_state for pair in zip(singles, (["task1"], ["task2"]), strict=True)]
    got = runner(**given, route=torch.tensor([2, 0])).last_hidden_state
    torch.testing.assert_close(got, torch.cat(expected), atol=EXACT, rtol=0)
    runner.refresh()
    assert runner.adapters == tuple(model.peft_config) == ("task1", "task2", "late")
    assert held is not None


@torch.no_grad()
def test_only_the_adapted_layers_are_touched(four):
    """Neither adding an adapter of the model nor removing it builds the runner anew."""
    _, model, folders = four
    given = inputs(vit)
    runner = fastcss.one_pass(model)
    held = runner._model_copy
    for turn in range(2):
        model.load_adapter(folders[2 + turn], f"late{turn}")
        runner.add(f"late{turn}")
        runner.remove("task0" if turn else "task1")
        assert runner._model_copy is held
        assert_equal(runner(**given), loop(model, given, runner.adapters))
    model.delete_adapter("late0")
    runner.remove("late0")
    assert_equal(runner(**given), loop(model, given, runner.adapters))
    assert runner._model_copy is held
    lora_layer = model.get_base_model().layers[0].attention.q_proj
    lora_layer.lora_B["late1"].weight.data.mul_(3)  # what came is followed as what was there
    assert_equal(runner(**given), loop(model, given, runner.adapters))
    lora_layer.set_scale("late1", 5.0)
    assert_equal(runner(**given), loop(model, given, runner.adapters))
    hook = lora_layer.lora_A["late1"].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"lora_A\.late1 has hooks"):
        runner(**given)
    hook.remove()
    assert_equal(runner(**given), loop(model, given, runner.adapters))


@torch.no_grad()
def test_a_folder_beside_the_models_own(four):
    bare, model, folders = four
    own = adapt(copy.deepcopy(bare), {"r": 3, "target_modules": ["q_proj"]})
    given, before = inputs(vit, 2), state_of(own)
    runner = fastcss.one_pass(own)
    runner.add(folders[1])  # also on layers that the model has no adapter on
    runner.add(folders[3], name="other")
    expected = [*loop(own, given), *loop(model, given, ["task1", "task3"])]
    assert_equal(runner(**given), expected)
    for made in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert made.adapters == runner.adapters == ("task0", "task1", "other")
        runner.refresh()
        assert_as_new(made, runner, given)
    assert_untouched(own, before)
    runner.refresh()
    assert_equal(runner(**given), expected)
    own.to(torch.float64)
    given = {name: value.double() for name, value in given.items()}
    assert_equal(runner(**given), [*loop(own, given), *loop(model.double(), given, ["task1", "task3"])])
    runner.remove("task0")
    runner.swap("other", folders[0])
    assert_equal(runner(**given), loop(model, given, ["task1", "task0"]))


@torch.no_grad()
def test_scales_are_pefts(four):
    bare, model, folders = four
    given = inputs(vit)
    read_ones, live = read(bare, folders), fastcss.one_pass(model)
    held = read_ones._model_copy, live._model_copy
    for factor in (-0.5, 0, 1):
        for runner in (read_ones, live):
            runner.set_scale("task1", factor)
        assert_same_bits(read_ones(**given), live(**given))
        twin = copy.deepcopy(model)
        for layer in twin.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("task1", factor)
        assert_equal(live(**given), loop(twin, given))
    assert (read_ones._model_copy, live._model_copy) == held
    live.set_scale("task1", 1)
    assert_as_new(live, fastcss.one_pass(model), given)
    live.set_scale("task2", 2)
    live.refresh()
    assert_same_bits(copy.deepcopy(live)(**given), live(**given))
    live.remove("task2")
    live.add("task2")  # at its own scale again
    assert_equal(live(**given), loop(model, given, ["task0", "task1", "task3", "task2"]))


@torch.no_grad()
def test_the_scale_of_what_pissa_took_out_stays(tmp_path):
    torch.manual_seed(0)
    bare, given = vit().eval(), inputs(vit)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(bare), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    runner = fastcss.one_pass.from_directories(bare, [tmp_path], names=["default"])
    for factor in (3.0, 0.0):
        runner.set_scale("default", factor)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", factor)
        torch.testing.assert_close(
            runner(**given).last_hidden_state[0], model(**given).last_hidden_state, atol=EXACT, rtol=0
        )


@torch.no_grad()
def test_what_wants_another_copy_gets_one(saved, tmp_path):
    """New layers, modules saved whole and kinds that PEFT reads: the runner is built anew, and gives the same."""
    bare, model, folders = saved
    given = inputs(vit)
    runner = read(bare, folders[:1])
    for place in (1, 2):  # other layers, and a convolution's adapter alone
        runner.add(folders[place])
        assert_as_new(runner, read(bare, folders[: place + 1]), given)
    runner.remove("task1")
    assert_as_new(runner, read(bare, [folders[0], folders[2]]), given)
    whole = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["pooler"]})
    whole.get_base_model().pooler.modules_to_save["task0"].dense.weight.mul_(-1)
    (folder,) = save(whole, tmp_path / "whole")
    runner.add(folder, name="whole")
    assert_equal(runner(**given), [*loop(model, given, ["task0", "task2"]), *loop(whole, given)])
    runner.set_scale("whole", 1.0)
    runner.remove("whole")
    assert_as_new(runner, read(bare, [folders[0], folders[2]]), given)


@pytest.mark.filterwarnings("ignore:.*one adapter at a time", "ignore:.*run in turn")
@torch.no_grad()
def test_what_peft_reads_comes_and_goes(tmp_path):
    torch.manual_seed(0)
    bare, given = vit().eval(), inputs(vit)
    models = [
        peft.get_peft_model(copy.deepcopy(bare), config).eval()
        for config in (
            peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
            peft.LoHaConfig(r=3, target_modules=["v_proj"], init_weights=False),
            peft.LoHaConfig(r=2, target_modules=["q_proj", "fc1"], init_weights=False),
        )
    ]
    for place, model in enumerate(models):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / f"task{place}")
    folders, before = [tmp_path / f"task{place}" for place in range(3)], state_of(bare)
    outputs = [model(**given) for model in models]
    runner = read(bare, folders[:1])
    runner.add(folders[1])
    runner.add(folders[2])
    assert_equal(runner(**given), outputs)
    runner.remove("task0")
    runner.swap("task2", folders[0])
    assert runner.adapters == ("task1", "task2")
    assert_equal(runner(**given), [outputs[1], outputs[0]])
    assert_untouched(bare, before)


def test_what_came_is_trained(four):
    _, model, folders = four
    runner = fastcss.one_pass(model)
    model.load_adapter(folders[0], "late", is_trainable=True)
    runner.add("late")
    runner.set_scale("late", 2.0)
    model.set_requires_grad("late")
    given, weight = inputs(vit), model.get_base_model().layers[0].attention.q_proj.lora_B["late"].weight
    runner(**given).last_hidden_state[-1, ..., 0].sum().backward()
    got, weight.grad = weight.grad, None
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("late", 2.0)
    model.set_adapter("late")
    model(**given).last_hidden_state[..., 0].sum().backward()
    torch.testing.assert_close(got, weight.grad, atol=10 * EXACT * float(weight.grad.abs().max()), rtol=0)
