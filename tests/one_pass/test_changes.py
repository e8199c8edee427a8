"""Changes of the model after the runner was built: each is seen at the next call, or refused with what to do."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import EXACT, SITES, adapt, assert_equal, build_adapted, inputs, loop, resnet, vit
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import fastcss

LAYER = "layers.0.attention.q_proj"


def lora(model, layer: str = LAYER):
    return model.get_base_model().get_submodule(layer)


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


# --- what is refused, with the remedy --------------------------------------------------------------------------------


def merge(model):
    model.merge_adapter(["task1"])


def add(model):
    model.add_adapter("new", peft.LoraConfig(r=2, target_modules=SITES[vit]))


def delete(model):
    model.delete_adapter("task1")


def disable(model):
    model.base_model.disable_adapter_layers()


def half_made(model):
    """Leave what PEFT leaves when add_adapter meets a layer that it has no LoRA for."""
    model.get_base_model().pooler.register_module("odd", nn.LayerNorm(3))
    with pytest.raises(ValueError, match="not supported"):
        model.add_adapter("new", peft.LoraConfig(r=2, target_modules=["q_proj", "odd"]))


def delete_half(model):
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.delete_adapter("new")


def parametrized(model):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(lora(model).lora_B["task1"], "weight", Double())


def replaced_forward(model):
    layer = lora(model)
    layer.forward = lambda x: x


def hook_inside(part):
    def add_hook(model):
        part(lora(model)).register_forward_hook(lambda *_: None)

    return add_hook


REFUSED = {
    "merged": (merge, lambda m: m.unmerge_adapter(), rf"{LAYER}.*merged.*unmerge_adapter\(\)"),
    "added": (add, None, r"task2, new now.*runner.refresh\(\)"),
    "deleted": (delete, None, r"task0, task2 now.*runner.refresh\(\)"),
    "disabled": (disable, lambda m: m.base_model.enable_adapter_layers(), f"{LAYER}.*enable_adapters"),
    "half-made": (half_made, delete_half, "layers.*adapter .new.*half-way"),
    "parametrized": (
        parametrized,
        lambda m: parametrize.remove_parametrizations(lora(m).lora_B["task1"], "weight"),
        f"{LAYER}.*lora_B.task1 is parametrized",
    ),
    "replaced forward": (replaced_forward, lambda m: vars(lora(m)).pop("forward"), f"{LAYER}.*replaced forward"),
    **{
        f"hook on {name}": (
            hook_inside(part), lambda m, part=part: part(lora(m))._forward_hooks.clear(), f"{LAYER}.*has hooks"
        )
        for name, part in {
            "lora_A": lambda layer: layer.lora_A["task1"],
            "lora_B": lambda layer: layer.lora_B["task0"],
            "dropout": lambda layer: layer.lora_dropout["task1"],
            "base_layer": lambda layer: layer.base_layer,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_what_changes_the_tasks_is_refused_with_the_remedy(what):
    change, mend, message = REFUSED[what]
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model)
    before = runner(**given)
    change(model)
    for _ in range(2):  # as long as it is so
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            runner(**given)
    if mend is None:
        runner.refresh()
        assert runner.adapters == tuple(model.peft_config)
    else:
        if what not in ("disabled",):
            with pytest.raises((TypeError, ValueError), match=message.split(".*")[0]):
                fastcss.one_pass(model)
        mend(model)
    got = runner(**given)
    assert_equal(got, loop(model, given))
    if mend is not None and what != "parametrized":
        torch.testing.assert_close(got[0], before[0], atol=EXACT, rtol=0)


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


def test_one_warning_names_the_adapters_that_do_not_train():
    model, given = build_adapted(vit), inputs(vit)
    model.train()
    runner = fastcss.one_pass(model)
    with pytest.warns(UserWarning, match=r"adapters task1, task2 get no gradients.*set_requires_grad"):
        runner(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(**given)
        fastcss.one_pass(model)(**given, adapters=["task0"])
        model.set_requires_grad(["task1", "task2"])
        fastcss.one_pass(model)(**given)
        model.set_adapter("task1")
        model.eval()
        fastcss.one_pass(model)(**given)
