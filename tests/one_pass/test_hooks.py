"""Tests hooks and replaced forwards, on adapted layers and elsewhere, from before and after the runner was built."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
import warnings

import pytest
import torch
from adapted_models import EXACT, adapt, assert_equal, build_adapted, inputs, loop, vit
from torch import nn

import fastcss

ADAPTED, PLAIN, ABOVE = "layers.0.attention.q_proj", "layers.0.layernorm_before", "layers.0.mlp"


class Recorder:
    """Stands for a user's object whose methods are hooks."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def record(self, module, args, output) -> None:
        self.seen.append(output.detach().clone())

    def __deepcopy__(self, memo):
        raise AssertionError("the user's object was copied")


def scale(module, args, output):
    return output * 1.5


def before(module, args):
    return (args[0].relu(), *args[1:])


def with_kwargs(module, args, kwargs, output):
    return output + 1


KINDS = {
    "forward": lambda m: m.register_forward_hook(scale),
    "pre": lambda m: m.register_forward_pre_hook(before),
    "kwargs": lambda m: m.register_forward_hook(with_kwargs, with_kwargs=True),
    "partial": lambda m: m.register_forward_hook(functools.partial(lambda by, m, a, out: out * by, 0.3)),
}


def checked(model, given):
    """Check that the runner gives what the loop gives, and says that hooks see the adapters in turn."""
    expected = loop(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = fastcss.one_pass(model)
        assert_equal(runner(**given), expected)
    assert runner.engine == "replay"
    return runner


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", [ADAPTED, PLAIN])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hooks_run_around_each_adapter(kind, where, late):
    model, given = build_adapted(vit), inputs(vit, 2)
    runner = fastcss.one_pass(model)
    bare = runner(**given)
    handle = KINDS[kind](model.get_base_model().get_submodule(where))
    if not late:
        runner = checked(model, given)
    expected = loop(model, given)
    assert (expected[1].last_hidden_state - bare.last_hidden_state[1]).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(runner(**given), expected)
        routed = runner(**given, route=torch.tensor([2, 0])).last_hidden_state
    wanted = torch.stack([expected[2].last_hidden_state[0], expected[0].last_hidden_state[1]])
    torch.testing.assert_close(routed, wanted, atol=EXACT, rtol=0)
    with pytest.raises(RuntimeError, match=f"{where} has hooks, which see"):
        fastcss.one_pass(model, engine="vmap")(**given)
    handle.remove()
    assert_equal(runner(**given), loop(model, given))
    assert runner.engine == "vmap"


@pytest.mark.parametrize("where", [ADAPTED, PLAIN])
@torch.no_grad()
def test_a_recorder_is_the_users_own(where):
    model, given, recorder = build_adapted(vit), inputs(vit), Recorder()
    model.get_base_model().get_submodule(where).register_forward_hook(recorder.record)
    model.get_base_model().recorder = recorder
    loop(model, given)
    expected, recorder.seen[:] = list(recorder.seen), []
    checked(model, given)
    assert len(expected) == 3
    seen = recorder.seen[3:] if len(recorder.seen) > 3 else recorder.seen  # ``checked`` runs the loop first
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("duplicate", [saved, copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
@torch.no_grad()
def test_what_a_hook_recorded_can_be_saved_and_fed_back(duplicate):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["1"]}
    model, seen = adapt(nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), config, config), []
    model.get_base_model()[2].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    runner = checked(model, {"input": torch.randn(3, 4)})
    features = seen[-2:]
    for tensor in features:
        assert torch.equal(duplicate(tensor), tensor)
        assert_equal(runner(tensor), loop(model, {"input": tensor}))


def test_backward_hooks():
    model, given, calls = build_adapted(vit), inputs(vit), []
    layer = model.get_base_model().get_submodule(ADAPTED)
    layer.register_full_backward_hook(lambda m, gi, go: calls.append(go[0].norm()))
    for output in loop(model, given):
        output.last_hidden_state.square().mean().backward()
    expected, calls[:] = list(calls), []
    model.set_requires_grad(["task0", "task1", "task2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fastcss.one_pass(model)(**given)
    sum(one.square().mean() for one in out.last_hidden_state).backward()
    assert len(calls) == 3
    torch.testing.assert_close(torch.stack(calls).sort()[0], torch.stack(expected).sort()[0])


@torch.no_grad()
def test_transformers_own_hooks_do_not_count():
    model, given = build_adapted(vit), {**inputs(vit), "output_hidden_states": True}
    expected = loop(model, given)  # leaves its collectors on the model
    runner = fastcss.one_pass(model)
    assert_equal(runner(**given), expected)
    assert runner.engine == "vmap"


# --- replaced forwards -----------------------------------------------------------------------------------------------


def by_closure(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5


def by_wraps(module):
    original = module.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs) * 1.5

    module.forward = forward


def by_method(module):
    module.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k) * 1.5, module)


def by_partial(module):
    """Wrap a module's forward by a partial, as accelerate does."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs) * 1.5

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


def by_child(module):
    """Replace a forward by a closure over the adapted layer itself, and one over a sibling that is copied later."""
    layer, original = module.fc1, module.forward
    module.forward = lambda x: original(x) + layer(x)[..., : x.shape[-1]]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("replace", [by_closure, by_wraps, by_method, by_partial, by_child])
@torch.no_grad()
def test_replaced_forwards_above_adapted_layers(replace, engine, late):
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model, engine=engine)
    bare = runner(**given)
    replace(model.get_base_model().get_submodule(ABOVE))
    if not late:
        runner = fastcss.one_pass(model, engine=engine)
    expected = loop(model, given)
    assert (expected[1].last_hidden_state - bare.last_hidden_state[1]).abs().max() > 1e-3
    assert_equal(runner(**given), expected)


class Holder:
    def __init__(self, layer) -> None:
        self.layer = layer


class Plain(nn.Module):
    """Keeps its layers a second time where modules() does not see them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def keep(self):
        held = {"list": [self.first], "dict": {"it": self.first}, "object": Holder(self.first)}
        vars(self)["held"] = held.get(self.how, self.first)

    def forward(self, x):
        held = self.held
        held = held[0] if self.how == "list" else held["it"] if self.how == "dict" else held
        layer = held.layer if self.how == "object" else held
        return self.second(torch.relu(layer(x)))


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("how", ["list", "dict", "attribute", "object"])
@torch.no_grad()
def test_adapted_layers_in_plain_containers(how, engine):
    torch.manual_seed(0)
    sites = [{"r": 2, "target_modules": [name]} for name in ("first", "second", "first")]
    model, x = adapt(Plain(how), *sites), torch.randn(3, 4)
    model.get_base_model().keep()
    runner = fastcss.one_pass(model, engine=engine)
    model.set_adapter("task1")  # which has nothing on the layer that is held
    assert_equal(runner(x), loop(model, {"x": x}))
    model.get_base_model().keep()
    assert_equal(runner(x), loop(model, {"x": x}))


HIDDEN: dict[str, nn.Module] = {}


class Global(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return HIDDEN["layer"](x)


@pytest.mark.parametrize("engine", ["auto", "vmap", "replay"])
@torch.no_grad()
def test_an_original_layer_that_runs_is_an_error(engine):
    """Nothing can see that the model refers to its layer in another way, so the call must fail, not be wrong."""
    model = adapt(Global(), *({"r": 2, "target_modules": ["first"]} for _ in range(2)))
    HIDDEN["layer"] = model.get_base_model().first
    with pytest.raises(TypeError, match="own LoRA layer 'first' ran"):
        fastcss.one_pass(model, engine=engine)(torch.randn(3, 4))


def test_a_model_that_keeps_its_last_features():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.holder = Holder(None)

        def forward(self, x):
            self.last = self.first(x)
            self.holder.layer = self.last
            return self.last + 1

    model, x = adapt(Keeps(), *({"r": 2, "target_modules": ["first"]} for _ in range(2))), torch.randn(3, 4)
    model(x)
    assert model.get_base_model().last.grad_fn is not None
    runner = fastcss.one_pass(model)
    for _ in range(2):
        assert_equal(runner(x), loop(model, {"x": x}))
