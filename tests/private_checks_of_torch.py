"""Checks what the package uses of torch and is private there: autograd, torch.func, torch.vmap and modes."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import fastcss  # noqa: F401  defines the ops
from fastcss._dispatch import private_apis as apis

CHECKS: dict[str, tuple[str, object]] = {}


def of(name: str, stops: str):
    """Let a function be the check of the symbol ``name``, without which ``stops`` stops."""

    def add(check):
        CHECKS[name] = stops, check
        return check

    return add


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


# --- autograd and torch.func ------------------------------------------------------------------------------------------


@of("BelowAutograd", "an op without gradients pays for autograd")
def _():
    x = torch.ones(2, requires_grad=True)
    with apis.BelowAutograd():
        assert (x * 2).grad_fn is None


@of("after_autograd_keyset", "ops in the graphs of torch.compile")
def _():
    assert not apis.after_autograd_keyset.has(torch.DispatchKey.AutogradCPU)
    assert apis.after_autograd_keyset.has(torch.DispatchKey.CPU)


@of("any_requires_grad", "gradients of every op")
def _():
    assert apis.any_requires_grad(1, None, torch.ones(1, requires_grad=True))
    assert not apis.any_requires_grad(1, None, torch.ones(1))


@of("transforms_are_active", "ops under torch.func")
def _():
    seen = []
    torch.vmap(lambda x: seen.append(apis.transforms_are_active()) or x)(torch.ones(2))
    assert seen == [True]
    assert not apis.transforms_are_active()


@of("tracing_state", "torch.jit.trace of a fused model")
def _():
    seen = []
    torch.jit.trace(lambda x: seen.append(apis.tracing_state() is not None) or x + 1, torch.ones(1), check_trace=False)
    assert seen == [True]
    assert apis.tracing_state() is None


@of("SingleLevelFunction", "ops under torch.func, by their raw names")
@of("enable_single_level_autograd_function", "ops under torch.func, by their raw names")
def _():
    class Double(apis.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 3

    x = torch.ones(1, requires_grad=True)
    with apis.enable_single_level_autograd_function():
        Double.apply(x).backward()
    assert x.grad.item() == 3


@of("forward_mode", "tangents: composed forms give way to kernels that have none")
@of("forward_mode_enabled", "tangents through an outer level of torch.func")
def _():
    assert not apis.forward_mode()
    with forward_ad.dual_level():
        assert apis.forward_mode()
        x = forward_ad.make_dual(torch.ones(1), torch.ones(1))
        with apis.forward_mode_enabled(False):
            assert forward_ad.unpack_dual(x * 2).tangent is None
        with apis.forward_mode_enabled(True):
            assert forward_ad.unpack_dual(x * 2).tangent.item() == 2


# --- torch.vmap -------------------------------------------------------------------------------------------------------


@of("is_vmapped", "one_pass side by side")
@of("is_wrapped", "reading of values under torch.func")
@of("get_unwrapped", "one_pass side by side, of a model that branches on a value")
@of("vmap_level", "one_pass side by side")
@of("without_vmap_axis", "one_pass side by side")
@of("with_vmap_axis", "one_pass side by side")
@of("beneath_transform", "one_pass side by side")
def _():
    def body(x):
        level = apis.vmap_level()
        assert apis.is_vmapped(x)
        assert apis.is_wrapped(x)
        assert apis.get_unwrapped(x).shape == (3, 2)
        value, dim = apis.without_vmap_axis(x, level)
        assert value.shape == (3, 2)
        assert dim == 0
        assert apis.without_vmap_axis(torch.ones(1), level)[1] is None
        with apis.beneath_transform():
            assert apis.vmap_level() is None
            doubled = value * 2
        return apis.with_vmap_axis(doubled, 0, level)

    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(torch.vmap(body)(x), x * 2)
    assert apis.vmap_level() is None
    torch.func.grad(lambda x: (x * (apis.vmap_level() is None)).sum())(x)  # another transform is none of vmap's levels
    assert not apis.is_vmapped(x)
    assert not apis.is_wrapped(x)


@of("has_alias", "writes of a task's values into a tensor that another name sees, silently")
def _():
    x = torch.ones(4)
    assert not apis.has_alias(x)
    view = x[:2]
    assert apis.has_alias(x)
    assert apis.has_alias(view)
    del view
    assert not apis.has_alias(x)


@of("HigherOrderOperator", "one_pass of models with flex_attention")
def _():
    from torch.nn.attention.flex_attention import flex_attention_hop

    assert isinstance(flex_attention_hop, apis.HigherOrderOperator)
    assert flex_attention_hop.name() == "flex_attention"


# --- modes ------------------------------------------------------------------------------------------------------------


@of("DisableTorchFunction", "adapted layers under one_pass's own rules")
@of("function_mode_is_enabled", "an op is one call to who watches")
@of("function_modes", "an op is one call to who watches, in torch.compile")
def _():
    assert not apis.function_mode_is_enabled()
    assert apis.function_modes() == 0
    with Watching() as mode:
        assert apis.function_mode_is_enabled()
        assert apis.function_modes() == 1
        before = mode.calls
        with apis.DisableTorchFunction():
            torch.ones(1) + 1
        assert mode.calls == before


@of("dispatch_mode", "tracing: an op would read values that are not there")
@of("DispatchModeKey", "tracing: an op would read values that are not there")
def _():
    seen = []

    def traced(x):
        seen.append([apis.dispatch_mode(getattr(apis.DispatchModeKey, key)) is not None for key in ("PROXY", "FAKE")])
        return x + 1

    make_fx(traced, tracing_mode="fake")(torch.ones(1))
    assert seen == [[True, True]]
    assert apis.dispatch_mode(apis.DispatchModeKey.PROXY) is None


@of("any_autocast_is_enabled", "one_pass in turn under autocast: results of another dtype would be taken over")
def _():
    assert not apis.any_autocast_is_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert apis.any_autocast_is_enabled()


@of("registrations", "the choice of implementation")
def _():
    assert "aten::add.Tensor" in apis.registrations("CPU")


@of("pytree", "models that take or return dicts, tuples and data classes")
def _():
    leaves, structure = apis.pytree.tree_flatten({"a": (1, [2]), "b": None})
    assert leaves == [1, 2, None]
    assert apis.pytree.tree_unflatten(leaves, structure) == {"a": (1, [2]), "b": None}
    assert apis.pytree.tree_map_only(int, str, (1, "x")) == ("1", "x")
    (path, leaf), *_ = apis.pytree.tree_flatten_with_path({"a": 3})[0]
    assert (apis.pytree.keystr(path), leaf) == ("['a']", 3)


@of("TorchDispatchMode", "one_pass in turn: a call that draws random numbers would be taken over")
def _():
    seen = []

    class Mode(apis.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.Tag.nondeterministic_seeded in func.tags)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.nn.functional.dropout(torch.ones(2)).add(1)
    assert seen.count(True) == 1
    assert seen[-1] is False
