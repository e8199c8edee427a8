"""Tests changes of the model after the runner was built: the next call sees them, however they were made."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from adapted_models import EXACT, adapt, assert_equal, build_adapted, inputs, loop, lora, resnet, vit
from safetensors.torch import load_file, save_file
from torch import nn

import fastcss


def b(model, adapter: str = "task1") -> nn.Parameter:
    return lora(model).lora_B[adapter].weight


def test_a_scale_that_is_a_tensor_is_seen_when_it_is_written():
    """PEFT multiplies by it; the dict that it is in holds the same object as before."""
    model = build_adapted(vit)
    lora(model).scaling["task1"] = torch.tensor(lora(model).scaling["task1"])
    runner, given = fastcss.one_pass(model), inputs(vit)
    with torch.no_grad():
        assert_equal(runner(**given), loop(model, given))
        lora(model).scaling["task1"].mul_(-3)
        assert_equal(runner(**given), loop(model, given))


# --- new values, however written -----------------------------------------------------------------------------------


def through_data(model):
    b(model).data.mul_(3)


def through_numpy(model):
    b(model).detach().numpy()[0] = 2


def one_element(model):
    b(model).data[5, 1] += 1


def at_the_same_address(model):
    weight = b(model)
    address, shape = weight.data_ptr(), weight.shape
    weight.data = torch.empty(0)
    tries = [torch.full(shape, 0.5) for _ in range(2000)]
    same = [t for t in tries if t.data_ptr() == address]
    weight.data = same[0] if same else tries[0]


def swapped_rows(model):
    b(model).data.copy_(b(model).data.flip(0))


def hotswap(model):
    from peft.utils.hotswap import hotswap_adapter

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["task1"])
        path = Path(folder, "task1", "adapter_model.safetensors")
        save_file({name: torch.randn_like(t) for name, t in load_file(path).items()}, path)
        hotswap_adapter(model, path.parent, "task1")


def assigned(model):
    model.load_state_dict({name: torch.randn_like(t) / 10 for name, t in model.state_dict().items()}, assign=True)


def to_double(model):
    model.to(torch.float64)


def replaced_parameter(model):
    lora(model).lora_B["task1"].weight = nn.Parameter(torch.randn_like(b(model)))


def rescaled(model):
    lora(model).set_scale("task1", 3.0)


def replaced_pooler(model):
    model.get_base_model().pooler = nn.Sequential(nn.Flatten(0, 1), nn.Linear(32, 4))


def other_base_layer(model):
    lora(model).base_layer = nn.Linear(32, 32)


def attribute(model):
    model.get_base_model().layernorm.eps = 1.0


def other_function(model):
    model.get_base_model().layers[1].mlp.activation_fn = nn.ReLU()


WRITES = [
    through_data, through_numpy, one_element, at_the_same_address, swapped_rows, hotswap, assigned, to_double,
    replaced_parameter, rescaled, replaced_pooler, other_base_layer, attribute, other_function,
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("change", WRITES)
def test_new_values_are_seen(change, engine, mode):
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model, engine=engine)
    with mode():
        for _ in range(3):
            before = runner(**given)
        with torch.no_grad():
            change(model)
        if change is to_double:
            given = {name: t.double() for name, t in given.items()}
        expected = loop(model, given)
        assert not torch.equal(expected[1].last_hidden_state, before.last_hidden_state[1]) or change is replaced_pooler
        assert_equal(runner(**given), expected, 10 * EXACT)
        assert_equal(runner(**given, adapters=["task1", "task0"]), [expected[1], expected[0]], 10 * EXACT)


def test_models_made_and_changed_under_inference_mode():
    given = inputs(vit)
    with torch.inference_mode():
        model = build_adapted(vit)
        runner = fastcss.one_pass(model)
        for _ in range(3):  # from the second on in one group, whose pack is kept
            assert_equal(runner(**given), loop(model, given))
        b(model).mul_(5)
        assert_equal(runner(**given), loop(model, given))


@torch.no_grad()
def test_buffers_and_dtype_of_a_model_with_batch_norm():
    model, given = build_adapted(resnet), inputs(resnet, 2)
    runner = fastcss.one_pass(model)
    runner(**given)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean = torch.randn_like(norm.running_mean)
    assert_equal(runner(**given), loop(model, given))
    model.to(torch.float64)
    given = {name: t.double() for name, t in given.items()}
    assert_equal(runner(**given), loop(model, given))


@torch.no_grad()
def test_adapters_of_folders_follow_the_bare_model(tmp_path):
    torch.manual_seed(0)
    model, bare = build_adapted(vit), None
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    bare = vit().eval()
    runner = fastcss.one_pass.from_directories(bare, [tmp_path / f"task{t}" for t in range(3)])
    assert_equal(runner(**inputs(vit)), loop(model, inputs(vit)))
    for changed in (bare, model.get_base_model()):
        torch.manual_seed(7)
        changed.pooler = nn.Sequential(nn.Flatten(0, 1), nn.Linear(32, 4))
        changed.layernorm.eps = 0.1
    assert_equal(runner(**inputs(vit)), loop(model, inputs(vit)))
    bare.layers[0].attention.q_proj = nn.Linear(32, 48)
    with pytest.raises(ValueError, match=r"layers.0.attention.q_proj' has another size"):
        runner(**inputs(vit))


@torch.no_grad()
def test_train_and_eval_of_a_single_adapted_layer():
    model = adapt(nn.Sequential(nn.Linear(64, 8)), {"r": 4, "target_modules": ["0"], "lora_dropout": 0.5})
    runner, x = fastcss.one_pass(model), torch.randn(1, 64)
    exact = runner(x)
    model.get_base_model()[0].train()
    assert not torch.equal(runner(x), exact)
    model.get_base_model()[0].eval()
    assert torch.equal(runner(x), exact)
    layer = model.get_base_model()[0]
    layer.lora_dropout["task0"].p = 0.0
    layer.train()
    torch.testing.assert_close(runner(x), exact)


@torch.no_grad()
def test_set_adapter_changes_nothing():
    """PEFT's loop sets adapters between calls: that must not cost a new copy."""
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model)
    model_copy = runner._model_copy
    for _ in range(2):
        assert_equal(runner(**given), loop(model, given))
        model.train()
        model.eval()
    assert runner._model_copy is model_copy
