"""Tests what adapters that run in turn share, and what each of them computes for itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapted_models import EXACT, adapt, assert_equal, loop
from torch import nn

import fastcss
from fastcss._one_pass.shared_work import SharedWork


class Beside(nn.Module):
    """A layer with adapters, and beside it ``call``, which none of them touches."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Linear(4, 4), call

    def forward(self, x):
        beside = self.call(x)
        return self.layer(x) + (beside[0] if isinstance(beside, (list, tuple)) else beside).float().mean(), beside


def beside(call, tasks: int = 3):
    torch.manual_seed(0)
    return adapt(Beside(call), *({"r": 2, "target_modules": ["layer"]} for _ in range(tasks)))


def _heads(x, p: float):
    eye, no = torch.ones(12, 4), torch.zeros(12)
    return F.multi_head_attention_forward(x, x, x, 4, 2, eye, no, None, None, False, p, torch.eye(4), no[:4])[0]


DRAWING = {
    "gumbel_softmax": F.gumbel_softmax,
    "dropout1d": lambda x: F.dropout1d(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(-x, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "multi_head_attention_forward": lambda x: _heads(x, 0.5),
    "uniform_": lambda x: torch.empty(4, 4).uniform_(),
    "out": lambda x: torch.rand(4, 4, out=torch.empty(4, 4)),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x.movedim(-1, 1), 2, output_size=17),
    "poisson": lambda x: torch.poisson(9 * x),
    "after no draws": lambda x: torch.poisson(x * 0).sum() + torch.poisson(9 * x),
    "after an empty one": lambda x: torch.randn_like(x[:0]).sum() + torch.randn_like(x),
    "own op": lambda x: torch.ops.test_one_pass.noise(x),
}


@torch.library.custom_op("test_one_pass::noise", mutates_args=())
def noise(x: torch.Tensor) -> torch.Tensor:
    """Draws, and carries no tag that says so."""
    return x + torch.rand(x.shape)


@pytest.mark.parametrize("what", DRAWING)
@torch.no_grad()
def test_random_numbers_are_drawn_for_each_adapter(what):
    """Nothing else draws here, so that ours are the numbers of the loop, drawn in its order."""
    model, x = beside(DRAWING[what]), torch.rand(64, 32, 4) if "pool" not in what else torch.rand(2, 40, 40, 4)
    torch.manual_seed(5)
    expected = loop(model, {"x": x})
    for _ in range(2):  # the second call knows already which functions draw
        torch.manual_seed(5)
        got = fastcss.one_pass(model, engine="replay")(x)
        assert_equal(got, expected)
        assert not torch.equal(got[1][0], got[1][1])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.dropout(x, 0.5, False) + 1,
        lambda x: F.rrelu(-x),
        lambda x: _heads(x, 0.0) if not x.requires_grad else None,
    ],
)
@torch.no_grad()
def test_what_could_draw_and_does_not_is_shared(call):
    got = fastcss.one_pass(beside(call), engine="replay")(torch.rand(3, 5, 4))[1]
    assert got.stride(0) == 0


@torch.no_grad()
def test_autocast_in_two_dtypes():
    """One tensor through the same layer in bfloat16, then in float16, then as it is."""
    weight = torch.randn(4, 4)

    def call(x):
        results = []
        for dtype in (torch.bfloat16, torch.float16, None):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                results.append(F.linear(x, weight))
        torch.set_default_dtype(torch.float64)
        results.append(torch.zeros(2))
        torch.set_default_dtype(torch.float32)
        return [*results, torch.zeros(2)]

    model, x = beside(call), torch.randn(2, 4)
    assert_equal(fastcss.one_pass(model, engine="replay")(x), loop(model, {"x": x}))


def test_gradients_are_switched_off_in_every_run():
    def call(x):
        with torch.no_grad():
            return x * 2

    model, x = beside(call), torch.rand(3, 4, requires_grad=True)
    seen = []
    runner = fastcss.one_pass(model, engine="replay")
    runner._model_copy.model.get_submodule("").call = lambda x: seen.append(call(x)) or seen[-1]
    runner(x)
    assert [t.requires_grad for t in seen] == [False] * 3


# --- what the model writes --------------------------------------------------------------------------------------------


def _extends_a_list(x):
    values = (x * 2).tolist()[0]
    values.append(5.0)
    return x * sum(values)


def _writes_through(memory):
    def call(x):
        made = x * 2
        view, before = made[0], made + 1
        memory(made)
        return made + 1, view * 3, before

    return call


def _data(made):
    made.data.mul_(3)


def _set_data(made):
    made.data = made.data * 3


def _numpy(made):
    array = made.numpy()
    array *= 3


def _pointer(made):
    import ctypes

    ctypes.memset(made.data_ptr(), 0, made.numel() * 4)


def _inference(made):
    with torch.inference_mode():
        frozen = made * 1
        before = frozen + 1
        frozen.mul_(2)
        made.copy_(before + (frozen + 1))


@pytest.mark.parametrize(
    "call",
    [_extends_a_list, *map(_writes_through, (_data, _set_data, _numpy, _pointer, _inference))],
    ids=["list", "data", "set data", "numpy", "pointer", "inference mode"],
)
@torch.no_grad()
def test_what_is_changed_after_it_was_shared_is_made_anew(call):
    model, x = beside(call), torch.rand(3, 4)
    assert_equal(fastcss.one_pass(model, engine="replay")(x), loop(model, {"x": x}))


# --- what the model keeps ---------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Computes features once, or once for every text, as OmDet-Turbo does."""

    def __init__(self, of_adapter: bool):
        super().__init__()
        self.layer, self.plain, self.of_adapter, self.known = nn.Linear(4, 4), nn.Linear(4, 4), of_adapter, {}

    def forward(self, x):
        if "text" not in self.known:
            self.known["text"] = (self.layer if self.of_adapter else self.plain)(torch.ones(4)).relu()
        return self.layer(x) + self.known["text"]


def remembers(of_adapter: bool):
    torch.manual_seed(0)
    return adapt(Remembers(of_adapter), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))


@pytest.mark.filterwarnings("ignore:.*does not run under vmap")
@pytest.mark.parametrize("engine", ["auto", "vmap", "replay"])
@torch.no_grad()
def test_one_adapters_features_are_no_others(engine):
    x = torch.rand(3, 4)
    message = "keeps a value" if engine == "vmap" else "uses a value of one adapter's pass.*keeps in 'known'"
    runner = fastcss.one_pass(remembers(True), engine=engine)
    with pytest.raises(RuntimeError, match=message):
        runner(x)
    if engine == "replay":  # from call to call as well
        runner = fastcss.one_pass(remembers(True), engine=engine)
        alone = runner(x, adapters=["task1"])
        torch.testing.assert_close(runner(x, adapters=["task1"]), alone)
        with pytest.raises(RuntimeError, match=message):
            runner(x, adapters=["task0"])


@pytest.mark.filterwarnings("ignore:.*does not run under vmap")
@torch.no_grad()
def test_what_vmap_leaves_in_a_cache_spoils_no_later_call():
    model, x = remembers(True), torch.rand(3, 4)
    model.get_base_model().known = Cache()
    runner = fastcss.one_pass(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot run under vmap: the model keeps.*in 'known', where nothing"):
            runner(x)


class Cache:
    """Keeps its values in a function's closure, where nothing puts them back."""

    def __init__(self):
        features = {}
        self.features = lambda: features

    def __contains__(self, key):
        return key in self.features()

    def __getitem__(self, key):
        return self.features()[key]

    def __setitem__(self, key, value):
        self.features()[key] = value


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_features_that_no_adapter_touches_may_be_kept(engine):
    model, x = remembers(False), torch.rand(3, 4)
    runner, expected = fastcss.one_pass(model, engine=engine), torch.stack(loop(model, {"x": x}))
    for names in (["task0"], ["task1", "task2"], None):
        wanted = expected if names is None else expected[[int(name[-1]) for name in names]]
        torch.testing.assert_close(runner(x, adapters=names), wanted, atol=EXACT, rtol=0)


# --- flex_attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_flex_attention(engine):
    """Against the loop with torch's other attention: the loop with this one compiles it first, for 20 s."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        attn_implementation="flex_attention",
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapt(transformers.ViTModel(config), *({"r": 2, "target_modules": ["q_proj"]} for _ in range(2)))
    given = {"pixel_values": torch.randn(2, 3, 16, 16)}
    got = fastcss.one_pass(model, engine=engine)(**given)
    model.get_base_model().set_attn_implementation("sdpa")
    assert_equal(got, loop(model, given))


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_a_function_that_the_model_compiles(engine):
    model, x = beside(torch.compile(lambda x: (x * 2).relu(), backend="eager")), torch.rand(3, 4)
    assert_equal(fastcss.one_pass(model, engine=engine)(x), loop(model, {"x": x}))


def test_a_call_under_no_grad_is_another_call():
    """The same function of the same tensors, whose result has no gradient there."""
    weight = nn.Parameter(torch.ones(3))
    with SharedWork([weight]):
        with torch.no_grad():
            assert not torch.mul(weight, 2).requires_grad
        assert torch.mul(weight, 2).requires_grad
