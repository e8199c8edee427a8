"""Tests kinds of adapters that have no form here: PEFT's own layers run, in turn inside of the pass."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from adapted_models import LAYER, assert_equal, assert_untouched, inputs, loop, reloaded, save, state_of, vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcss

QV = {"target_modules": ["q_proj", "v_proj"]}


def _psoft(_):
    return peft.PsoftConfig(r=4, **QV) if hasattr(peft, "PsoftConfig") else pytest.skip("an older peft")


# Deltas of the weight, scales of activations, rotations of input and weight, a decomposition, what PEFT makes of the
# base weights, what it keeps for all layers, and layers of other classes.
KINDS = {
    "loha": lambda t: peft.LoHaConfig(r=2 + t, **QV),
    "loha with a module": lambda t: peft.LoHaConfig(r=2 + t, modules_to_save=["pooler"], **QV),
    "lokr": lambda t: peft.LoKrConfig(r=2 + t, **QV),
    "fourierft": lambda _: peft.FourierFTConfig(n_frequency=20, **QV),
    "ia3": lambda _: peft.IA3Config(feedforward_modules=["v_proj"], **QV),
    "vera": lambda _: peft.VeraConfig(r=4, **QV),
    "oft": lambda _: peft.OFTConfig(r=0, oft_block_size=4, **QV),
    "boft": lambda _: peft.BOFTConfig(boft_block_size=4, **QV),
    "hra": lambda _: peft.HRAConfig(r=2, **QV),
    "adalora": lambda t: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, inference_mode=t > 0, **QV),
    "psoft": _psoft,
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
def test_a_kind_runs_as_peft_runs_it(kind, tmp_path):
    """Side by side and in turn, with changed values, routed, trained, and from folders."""
    bare, model, given = make([KINDS[kind](t) for t in range(2)])
    before = state_of(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = fastcss.one_pass(model)
        got = runner(**given)
        assert runner.engine == "vmap"
        assert_untouched(model, before)
        assert_equal(got, loop(model, given))
        held = runner._model_copy
        for name, parameter in model.named_parameters():
            if "task1" in name and parameter.is_floating_point():
                parameter.data.mul_(1.5)
        assert_equal(runner(**given), loop(model, given))
        assert_equal(fastcss.one_pass(model, engine="replay")(**given), loop(model, given))
        routed = runner(**given, route=torch.tensor([1, -1])).last_hidden_state
        assert runner._model_copy is held
        (chosen,) = loop(model, {"pixel_values": given["pixel_values"][:1]}, ["task1"])
        with model.disable_adapter():
            plain = model(given["pixel_values"][1:])
            with pytest.raises(RuntimeError, match="switched off"):
                runner(**given)
    expected = torch.cat([chosen.last_hidden_state, plain.last_hidden_state])
    torch.testing.assert_close(routed, expected, atol=1e-5, rtol=0)
    assert_trains_as_peft(model, given)
    folders = save(model.eval(), tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_folders_run(bare, folders, given)


def assert_folders_run(bare, folders, given):
    before, drawn = state_of(bare), torch.get_rng_state()
    of_folders = fastcss.one_pass.from_directories(bare, folders)
    assert torch.equal(torch.get_rng_state(), drawn)
    got = of_folders(**given)
    assert_untouched(bare, before)
    assert_equal(got, reloaded(bare, folders, given))
    assert_equal(copy.deepcopy(of_folders)(**given), reloaded(bare, folders, given))
    assert of_folders.engine == "vmap"
    for parameter in bare.parameters():  # parts of an adapter may be made of these
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    bare.layernorm.eps = 0.1
    assert_equal(of_folders(**given), reloaded(bare, folders, given))
    bare.layernorm = nn.LayerNorm(32, eps=0.3)
    assert_equal(of_folders(**given), reloaded(bare, folders, given))


def assert_trains_as_peft(model, given):
    """Compare the gradients of every adapter; the sum of squares behind a layer norm would hardly have any."""
    model.train()
    model.set_requires_grad(["task0", "task1"])
    weights = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(5))
    runner = fastcss.one_pass(model, engine="vmap")
    (runner(**given).last_hidden_state * weights).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    outputs = []
    for adapter in ("task0", "task1"):
        model.set_adapter(adapter)
        model.set_requires_grad(["task0", "task1"])
        outputs.append(model(**given).last_hidden_state)
    sum((output * weights).sum() for output in outputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    for name, gradient in expected.items():
        atol = 1e-6 + 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, atol=atol, rtol=0, msg=name)


@torch.no_grad()
def test_kinds_mixed_in_one_model():
    kinds = [peft.LoHaConfig(r=2, **QV), peft.LoKrConfig(r=2, **QV), peft.LoraConfig(r=2, **QV)]
    _, model, given = make(kinds, mixed=True)
    runner = fastcss.one_pass(model)
    assert_equal(runner(**given), loop(model, given, ["task0", "task1", "task2"]))
    assert runner.engine == "vmap"
    other = pickle.loads(pickle.dumps(runner))
    assert_equal(other(**given), loop(model, given, ["task0", "task1", "task2"]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


def attention():
    """Make what PEFT's layer on attention is for: it merges and unmerges in every call."""
    torch.manual_seed(0)
    bare = Attention()
    configs = [peft.LoraConfig(r=r, target_modules=["attention"]) for r in (2, 3)]
    model = peft.get_peft_model(copy.deepcopy(bare), configs[0], adapter_name="task0")
    model.add_adapter("task1", configs[1])
    moved(model).train()  # torch's own fast path of eval mode reads past PEFT's layers
    return bare.train(), model, torch.randn(2, 5, 8)


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_layers_that_put_other_parameters_into_their_base(engine, tmp_path):
    """Such a layer has merged when a call fails."""
    bare, model, x = attention()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runner = fastcss.one_pass(model, engine=engine)
    runner(x)
    with pytest.raises(Exception, match="8"):
        runner(torch.randn(2, 5, 7))
    got = runner(x)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert_equal(got, loop(model, {"x": x}))
    folders, before = save(model, tmp_path), {name: p.clone() for name, p in bare.named_parameters()}
    of_folders = fastcss.one_pass.from_directories(bare, folders, engine=engine)
    assert_equal(of_folders(x), reloaded(bare, folders, {"x": x}, train=True))
    assert all(torch.equal(parameter, before[name]) for name, parameter in bare.named_parameters())
    bare.attention.in_proj_weight.data.mul_(1.5)
    assert_equal(of_folders(x), reloaded(bare, folders, {"x": x}, train=True))


@torch.no_grad()
def test_layers_that_put_other_parameters_into_their_base_run_in_one_thread_at_a_time():
    """Two calls of one runner share its copy: one would run with weights that the other has merged or taken out."""
    _, model, x = attention()
    runner = fastcss.one_pass(model, engine="replay")
    expected, got, entered = runner(x), [], threading.Event()
    copied = runner._model_copy.model.attention.base_layer
    call = type(copied).forward

    def slow(self, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            time.sleep(0.1)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(copied), "forward", slow)
        thread = threading.Thread(target=lambda: got.append(torch.no_grad()(runner)(x)))
        thread.start()
        entered.wait(10)
        got.append(runner(x))
        thread.join()
    for result in got:
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


class Last(nn.Module):
    """Has an adapter in its last layer, whose input is the same for all tasks."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(x)


@torch.no_grad()
def test_the_base_layer_runs_once_where_the_tasks_share_its_input():
    torch.manual_seed(0)
    config = peft.LoHaConfig(r=2, target_modules=["last"])
    model = peft.get_peft_model(Last(), config, adapter_name="task0")
    model.add_adapter("task1", config)
    runner, x, calls = fastcss.one_pass(moved(model)), torch.randn(2, 3, 8), []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func) if func is torch.ops.aten.addmm.default else None
            return func(*args, **(kwargs or {}))

    runner(x)
    with Counting():
        got = runner(x)
    assert len(calls) == 1  # the deltas have no bias
    assert_equal(got, loop(model, {"x": x}))


class Halves(torch.Tensor):
    """Holds a weight in bfloat16, as torchao's classes hold theirs in int8: only its own linear layer knows it."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)

    def __init__(self, held):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.held.float(), bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].held)
        raise NotImplementedError(func)


@torch.no_grad()
def test_a_base_layer_whose_weight_is_of_another_librarys_class(tmp_path):
    torch.manual_seed(0)
    bare = Last()
    bare.last.weight = nn.Parameter(Halves(bare.last.weight.bfloat16()), requires_grad=False)
    model = peft.get_peft_model(bare, peft.LoraConfig(r=2, target_modules=["last"]), adapter_name="task0")
    model.add_adapter("task1", peft.LoraConfig(r=3, target_modules=["last"]))
    x = torch.randn(2, 3, 8)
    for engine in ("vmap", "replay"):
        assert_equal(fastcss.one_pass(moved(model), engine=engine)(x), loop(model, {"x": x}))
    folders = save(model, tmp_path)
    model = Last()
    model.last.weight = bare.last.weight
    with pytest.raises(TypeError, match="Linear 'last' has a weight of class Halves, as quantised layers have"):
        fastcss.one_pass.from_directories(model, folders)


@torch.no_grad()
def test_a_merged_kind_is_refused():
    _, model, _ = make([KINDS["loha"](0)])
    model.get_base_model().get_submodule(LAYER).merge()
    with pytest.raises(ValueError, match="merged"):
        fastcss.one_pass(model)


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
