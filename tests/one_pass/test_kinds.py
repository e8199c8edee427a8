"""Tests kinds of adapters that have no form here: PEFT's own layers run, in turn, live and from folders."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from adapted_models import LAYER, assert_equal, assert_untouched, inputs, loop, reloaded, save, state_of, vit
from torch import nn

import fastcss

QV = {"target_modules": ["q_proj", "v_proj"]}
# A delta of the weight, a scale of activations, rotations, a decomposition, and what PEFT makes of the base weights.
KINDS = {
    "dora": lambda t: peft.LoraConfig(r=2 + t, use_dora=True, **QV),
    "one dora": lambda t: peft.LoraConfig(r=2 + t, use_dora=t == 1, **QV),
    "loha": lambda t: peft.LoHaConfig(r=2 + t, **QV),
    "loha with a module": lambda t: peft.LoHaConfig(r=2 + t, modules_to_save=["pooler"], **QV),
    "ia3": lambda _: peft.IA3Config(feedforward_modules=["v_proj"], **QV),
    "vera": lambda _: peft.VeraConfig(r=4, **QV),
    "hra": lambda _: peft.HRAConfig(r=2, **QV),
    "adalora": lambda t: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, inference_mode=t > 0, **QV),
    "psoft": lambda _: peft.PsoftConfig(r=4, **QV) if hasattr(peft, "PsoftConfig") else pytest.skip("an older peft"),
    "norms": lambda _: peft.LNTuningConfig(target_modules=["layernorm_before"]),
}


def moved(model):
    """Return ``model`` with adapters that are not what they begin as."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{adapter}" in name for adapter in model.peft_config) and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(configs, mixed=False):
    torch.manual_seed(0)
    bare = vit().eval()
    model = peft.get_peft_model(copy.deepcopy(bare), configs[0], adapter_name="task0", mixed=mixed)
    for t, config in enumerate(configs[1:], 1):
        model.add_adapter(f"task{t}", config)
    return bare, moved(model), inputs(vit, 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_kind_runs_by_pefts_own_layers(kind, tmp_path):
    bare, model, given = make([KINDS[kind](t) for t in range(2)])
    before = state_of(model)
    runner = fastcss.one_pass(model)
    assert runner.engine == "replay"
    with pytest.warns(UserWarning, match="which PEFT's own layers run, one adapter at a time"):
        got = runner(**given)
    assert_untouched(model, before)
    assert_equal(got, loop(model, given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        held = runner._model_copy
        for name, parameter in model.named_parameters():
            if "task1" in name and parameter.is_floating_point():
                parameter.data.mul_(1.5)
        assert_equal(runner(**given), loop(model, given))
        assert runner._model_copy is held
        routed = runner(**given, route=torch.tensor([1, -1])).last_hidden_state
    (chosen,) = loop(model, {"pixel_values": given["pixel_values"][:1]}, ["task1"])
    with model.disable_adapter():
        plain = model(given["pixel_values"][1:])
        with pytest.raises(RuntimeError, match="switched off"):
            runner(**given)
    expected = torch.cat([chosen.last_hidden_state, plain.last_hidden_state])
    torch.testing.assert_close(routed, expected, atol=1e-5, rtol=0)
    folders, before, drawn = save(model, tmp_path), state_of(bare), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_folders = fastcss.one_pass.from_directories(bare, folders)
        assert torch.equal(torch.get_rng_state(), drawn)
        got = of_folders(**given)
        assert_untouched(bare, before)
        assert_equal(got, reloaded(bare, folders, given))
        assert_equal(copy.deepcopy(of_folders)(**given), reloaded(bare, folders, given))
        for parameter in bare.parameters():  # parts of an adapter may be made of these
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
        bare.layernorm.eps = 0.1
        assert_equal(of_folders(**given), reloaded(bare, folders, given))
        bare.layernorm = nn.LayerNorm(32, eps=0.3)
        assert_equal(of_folders(**given), reloaded(bare, folders, given))


def test_training_follows_peft_and_reaches_every_adapter():
    _, model, given = make([peft.LoHaConfig(r=2, **QV), peft.LoHaConfig(r=3, **QV)])
    model.set_requires_grad(["task0", "task1"])
    model.train()
    with pytest.warns(UserWarning, match="in turn"):
        fastcss.one_pass(model)(**given).last_hidden_state.square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    outputs = []
    for adapter in ("task0", "task1"):
        model.set_adapter(adapter)
        model.set_requires_grad(["task0", "task1"])
        outputs.append(model(**given).last_hidden_state)
    sum(output.square().sum() for output in outputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_kinds_mixed_in_one_model():
    kinds = [peft.LoHaConfig(r=2, **QV), peft.LoKrConfig(r=2, **QV), peft.LoraConfig(r=2, **QV)]
    _, model, given = make(kinds, mixed=True)
    runner = fastcss.one_pass(model, engine="replay")
    assert_equal(runner(**given), loop(model, given, ["task0", "task1", "task2"]))
    other = pickle.loads(pickle.dumps(runner))
    assert_equal(other(**given), loop(model, given, ["task0", "task1", "task2"]))


@torch.no_grad()
def test_layers_that_put_other_parameters_into_their_base():
    """PEFT's layer on attention merges and unmerges in every call, and has merged when a call fails."""
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    configs = [peft.LoraConfig(r=r, target_modules=["attention"]) for r in (2, 3)]
    model = peft.get_peft_model(Attention(), configs[0], adapter_name="task0")
    model.add_adapter("task1", configs[1])
    moved(model).train()  # torch's own fast path of eval mode reads past PEFT's layers
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runner, x = fastcss.one_pass(model, engine="replay"), torch.randn(2, 5, 8)
    runner(x)
    with pytest.raises(Exception, match="8"):
        runner(torch.randn(2, 5, 7))
    got = runner(x)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert_equal(got, loop(model, {"x": x}))


@torch.no_grad()
def test_a_kind_refuses_vmap_by_its_reason():
    _, model, given = make([KINDS["loha"](0)])
    runner = fastcss.one_pass(model, engine="vmap")
    with pytest.raises(RuntimeError, match="'vmap' cannot run the model: adapter 'task0' is LOHA"):
        runner(**given)
    model.get_base_model().get_submodule(LAYER).merge()
    with pytest.raises(ValueError, match="merged"):
        runner(**given)


def test_what_peft_would_leave_out_of_a_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    bare, model, _ = make([KINDS["loha"](0)])
    (folder,) = save(model, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.layers.7.hada_w1_a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"layers.7.hada_w1_a' has no place in the model"):
        fastcss.one_pass.from_directories(bare, [folder])
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ValueError, match="is not in the folder, and PEFT would draw it at random"):
        fastcss.one_pass.from_directories(bare, [folder])
