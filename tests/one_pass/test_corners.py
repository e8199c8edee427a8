"""Tests the runner with what it meets: tensor subclasses, scripts, exporters, trainers, torch's fused layers."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from adapted_models import EXACT, adapt, assert_equal, loop
from torch import Tensor, nn

import fastcss
from fastcss._fuse import linear


class Between(nn.Module):
    """Two layers, the first with adapters, and ``middle`` between them."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), middle, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def between(middle: nn.Module, tasks: int = 3, sites=("first",)):
    torch.manual_seed(0)
    return adapt(Between(middle), *({"r": 2, "target_modules": list(sites)} for _ in range(tasks)))


# --- tensor subclasses ------------------------------------------------------------------------------------------------


class Quantised(Tensor):
    """Is a weight in int8 with a linear of its own that knows none of our ops, as torchao's."""

    @staticmethod
    def __new__(cls, values: Tensor):
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        made.scale = values.detach().abs().amax() / 127
        made.whole = (values.detach() / made.scale).round().to(torch.int8)
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = (*args, *(kwargs or {}).values())
            return torch.mul(x @ weight.whole.t().to(x.dtype), weight.scale) + (bias[0] if bias else 0)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Quantised: no {func}")


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_a_quantised_layer_keeps_its_own_linear(engine, fuse, monkeypatch):
    """The layer must keep its own linear even if our GEMM is faster for plain weights."""
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    model, x = between(nn.Linear(8, 8)), torch.randn(4, 20, 8)
    middle = model.get_base_model().middle
    middle.weight = nn.Parameter(Quantised(middle.weight), requires_grad=False)
    runner = fastcss.one_pass(model, engine=engine, fuse=fuse)
    assert_equal(runner(x), loop(model, {"x": x}))
    assert_equal(runner(x), loop(model, {"x": x}))


# --- scripts and exports ----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x):
        if bool(x.sum() > 1e9):
            return x
        return x * 2


@pytest.mark.parametrize("engine", ["auto", "replay"])
@pytest.mark.parametrize("kind", ["script", "trace", "branch"])
@torch.no_grad()
def test_a_scripted_module(kind, engine):
    x = torch.randn(4, 8)
    if kind == "trace":
        middle = torch.jit.trace(nn.Linear(8, 8), x)
    else:
        middle = torch.jit.script(Branches() if kind == "branch" else nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = between(middle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(fastcss.one_pass(model, engine=engine)(x), loop(model, {"x": x}))


class Runs(nn.Module):
    def __init__(self, runner):
        super().__init__()
        self.run = [runner]

    def forward(self, x):
        return self.run[0](x)


@pytest.mark.parametrize("engine", ["auto", "replay"])
@torch.no_grad()
def test_export(engine):
    model, x = between(nn.ReLU(), sites=("first", "last")), torch.randn(4, 8)
    exported = torch.export.export(Runs(fastcss.one_pass(model, engine=engine)), (x,)).module()
    for given in (x, torch.randn(4, 8)):
        assert_equal(exported(given), loop(model, {"x": given}))
        torch.testing.assert_close(exported(given), fastcss.one_pass(model)(given), atol=EXACT, rtol=0)
    runner = fastcss.one_pass(model)
    torch.export.export(Runs(runner), (x,))
    assert_equal(runner(x), loop(model, {"x": x}))  # nothing of the export stays in the runner
    assert runner.engine == "vmap"
    with pytest.raises(RuntimeError, match="'vmap' cannot be exported"):
        torch.export.export(Runs(fastcss.one_pass(model, engine="vmap")), (x,))


# --- trainers ---------------------------------------------------------------------------------------------------------


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"x": torch.full((8,), float(i)), "labels": torch.tensor(i)}


class Scores(Runs):
    def forward(self, x, labels):
        logits = self.run[0](x)
        return {"loss": logits.mean(), "logits": logits}


@torch.no_grad()
def test_a_trainers_evaluation_with_the_task_axis_second(tmp_path):
    model = between(nn.ReLU())
    runner = fastcss.one_pass(model, task_dim=1)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(Scores(runner), arguments, eval_dataset=Dataset())
    result = trainer.predict(Dataset())
    x = torch.stack([Dataset()[i]["x"] for i in range(10)])
    expected = torch.stack(loop(model, {"x": x}), 1)
    assert result.predictions.shape == (10, 3, 8)
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected, atol=EXACT, rtol=0)
    assert result.label_ids.tolist() == list(range(10))


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_the_task_axis_second(engine):
    class Several(Between):
        def forward(self, x):
            y = super().forward(x)
            return {"y": y, "loss": y.mean(), "untouched": x * 2, "name": "several"}

    torch.manual_seed(0)
    model = adapt(Several(nn.ReLU()), *({"r": 2, "target_modules": ["first"]} for _ in range(3)))
    x = torch.randn(5, 8)
    first = fastcss.one_pass(model, engine=engine)(x)
    second = fastcss.one_pass(model, engine=engine, task_dim=1)(x)
    for key in ("y", "untouched"):
        assert second[key].shape == (5, 3, 8)
        torch.testing.assert_close(second[key], first[key].transpose(0, 1))
    torch.testing.assert_close(second["loss"], first["loss"])
    assert second["name"] == "several"
    with pytest.raises(ValueError, match="task_dim must be 0 or 1, got 2"):
        fastcss.one_pass(model, task_dim=2)


# --- torch's fused encoder layer --------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_in_torchs_encoder_layer_are_applied_and_it_says_so():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = between(layer, sites=("linear1", "linear2"))
    x = torch.randn(2, 5, 8)
    with pytest.warns(UserWarning, match="'middle.linear1' is in a torch.nn.TransformerEncoderLayer.*applies it"):
        runner = fastcss.one_pass(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = loop(model, {"x": x})
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    ignored = loop(model, {"x": x})
    assert torch.equal(ignored[0], ignored[1])  # what the warning is about
    assert_equal(runner(x), expected)
    for engine in ("vmap", "replay"):
        with pytest.warns(UserWarning, match="TransformerEncoderLayer"):
            assert_equal(fastcss.one_pass(model, engine=engine)(x), expected)
