"""Tests what torch makes of a runner: exported and compiled programs, AOTInductor's and ONNX's."""

from __future__ import annotations

import gc
import io
import re
import warnings
import weakref

import peft
import pytest
import torch
import transformers
from adapted_models import EXACT, adapt, assert_equal, inputs, loop, vit
from torch import nn
from torch.utils import _pytree as pytree

import fastcss

BATCH = torch.export.Dim("batch", min=2, max=64)


def segformer():
    """Build Hugging Face's recipe: LoRA in the encoder, and a head for each task."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    sites = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["decode_head"]}
    return adapt(transformers.SegformerForSemanticSegmentation(config), sites, sites)


class Small(nn.Module):
    """Has an attribute that decides its output, and an option that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.drop, self.by = nn.Dropout(0.5), 1.0

    def forward(self, x, scale=2.0):
        x = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return x * self.by if scale is None else x * scale


def small() -> tuple[peft.PeftModel, torch.Tensor]:
    torch.manual_seed(0)
    sites = {"target_modules": ["first", "last"], "r": 2}
    return adapt(Small(), sites, {**sites, "r": 3}), torch.randn(3, 8)


def assert_same(got, wanted) -> None:
    for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=0)


# --- torch.export -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_export_with_a_dynamic_batch():
    """The program has the runner's parameters as its own: their names are the runner's, and new values count."""
    model, example = segformer(), inputs(vit, 3)
    runner = fastcss.one_pass(model)
    program = torch.export.export(runner, (), example, dynamic_shapes={"pixel_values": {0: BATCH}})
    assert set(program.state_dict) == set(runner.state_dict())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded, given = torch.export.load(file).module(), inputs(vit, 5)
    assert_equal(loaded(**given), loop(model, given))
    for parameter in model.parameters():
        parameter.mul_(1.2)
    loaded.load_state_dict(runner.state_dict())
    assert_equal(loaded(**given), loop(model, given))
    assert_equal(runner(**given), loop(model, given))
    assert runner.engine == "vmap"


@torch.no_grad()
def test_export_of_a_subset_and_of_folders(tmp_path):
    model, x = small()
    model.save_pretrained(tmp_path)
    program = torch.export.export(fastcss.one_pass(model), (x,), {"adapters": ["task1", "task0"]}).module()
    assert_equal(program(x, adapters=["task1", "task0"]), loop(model, {"x": x}, ["task1", "task0"]))
    runner = fastcss.one_pass.from_directories(model.unload(), [tmp_path / "task0", tmp_path / "task1"])
    program = torch.export.export(runner, (x,))
    assert_same(program.module()(x), runner(x))
    assert set(program.state_dict) == set(runner.state_dict())


class Twice(Small):
    """Has a layer by two names, as models with tied heads have, and PEFT's layers with shared projections."""

    def __init__(self):
        super().__init__()
        self.again = self.norm

    def forward(self, x):
        return self.last(self.again(self.first(x)))


@torch.no_grad()
def test_export_of_a_module_by_two_names(tmp_path):
    torch.manual_seed(0)
    sites, x = {"target_modules": ["first", "last"], "r": 2}, torch.randn(3, 8)
    model = adapt(Twice(), sites, {**sites, "r": 3})
    program = torch.export.export(fastcss.one_pass(model), (x,))
    assert_equal(program.module()(x), loop(model, {"x": x}))
    model.save_pretrained(tmp_path)
    runner = fastcss.one_pass.from_directories(model.unload(), [tmp_path / "task0", tmp_path / "task1"])
    assert_same(torch.export.export(runner, (x,)).module()(x), runner(x))


@torch.no_grad()
def test_aot_inductor(tmp_path):
    model, x = small()
    runner = fastcss.one_pass(model)
    program = torch.export.export(runner, (x,), dynamic_shapes={"x": {0: BATCH}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "runner.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for given in (x, torch.randn(7, 8)):
        assert_equal(compiled(given), loop(model, {"x": given}))


@torch.no_grad()
def test_onnx_has_no_operator_of_ours(monkeypatch):
    """The ops take their composed forms, of torch's own, while torch exports for ONNX."""
    model, x = small()
    runner = fastcss.one_pass(model)

    def ours(program) -> list[str]:
        return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastcss")]

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(runner, (x,))
    assert not ours(program)
    assert_equal(program.module()(x), loop(model, {"x": x}))


@torch.no_grad()
def test_onnx_runtime(tmp_path):
    engine = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            fastcss.one_pass(model), (x,), tmp_path / "runner.onnx", dynamo=True, verbose=False,
            dynamic_shapes={"x": {0: BATCH}},
        )  # fmt: skip
    session = engine.InferenceSession(tmp_path / "runner.onnx")
    for given in (x, torch.randn(7, 8)):
        (got,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        assert_equal(torch.from_numpy(got), loop(model, {"x": given}))


# --- torch.compile with fullgraph=True --------------------------------------------------------------------------------


def whole(runner):
    torch.compiler.reset()
    return torch.compile(runner, fullgraph=True, backend="aot_eager")


def test_one_graph_with_gradients():
    model, x = small()
    model.train().get_base_model().drop.p = 0.0
    runner = fastcss.one_pass(model)
    runner.set_requires_grad()
    compiled = whole(runner)

    def gradients(run) -> dict:
        model.zero_grad()
        run(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted, got = gradients(runner), gradients(compiled)
    assert got.keys() == wanted.keys()
    assert len(got) == 8
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=EXACT * max(1, float(gradient.abs().max())), rtol=0)


@torch.no_grad()
def test_one_graph_follows_weights_and_is_compiled_anew_where_it_can_tell():
    model, x = small()
    runner = fastcss.one_pass(model)
    compiled = whole(runner)
    compiled(x)
    for parameter in model.parameters():
        parameter.mul_(1.2)
    assert_equal(compiled(x), loop(model, {"x": x}))
    bigger = torch.randn(5, 8)
    assert_equal(compiled(bigger, adapters=["task1", "task0"]), loop(model, {"x": bigger}, ["task1", "task0"]))
    assert_equal(compiled(x, scale=None), loop(model, {"x": x, "scale": None}))
    model.train()
    assert (compiled(x) - compiled(x)).abs().max() > 0.1  # dropout
    model.eval()
    assert_equal(compiled(x), loop(model, {"x": x}))


def _attribute(model):
    model.get_base_model().by = 3.0


def _mode(model):
    model.get_base_model().drop.train()


def _parameter(model):
    part = model.get_base_model().first.lora_A["task1"]
    part.weight = nn.Parameter(torch.randn(3, 8), part.weight.requires_grad)


@torch.no_grad()
def test_one_graph_of_another_model_than_it_was_raises():
    """A call is right, where torch itself sees the change, or it raises."""
    model, x = small()
    runner = fastcss.one_pass(model)
    compiled = whole(runner)
    before, raised = compiled(x, scale=None), {}
    for change in (_attribute, _parameter, _mode):
        change(model)
        try:
            got = compiled(x, scale=None)
        except RuntimeError as error:
            raised[change] = str(error)
            runner.refresh()
            got = compiled(x, scale=None)
        assert (got - before).abs().max() > 0.01
        before = got
        if change is not _mode:
            assert_equal(got, loop(model, {"x": x, "scale": None}))
    assert {_attribute, _mode} <= raised.keys()
    for message in raised.values():
        assert re.search(r"changed since the runner was compiled.*runner\.refresh\(\)", message)


@torch.no_grad()
def test_one_graph_is_compiled_anew_for_other_adapters():
    model, x = small()
    runner = fastcss.one_pass(model)
    compiled = whole(runner)
    assert compiled(x).shape == (2, 3, 4)
    runner.set_scale("task0", 3.0)
    assert_same(compiled(x), runner(x))
    runner.remove("task1")
    assert_same(compiled(x), runner(x))


def test_one_graph_around_a_runner():
    model, x = small()
    runner = fastcss.one_pass(model)
    compiled = whole(lambda x: runner(x * 2).sum(-1))
    with torch.no_grad():
        assert_equal(compiled(x), [output.sum(-1) for output in loop(model, {"x": x * 2})])


@torch.no_grad()
def test_what_no_trace_can_hold_is_refused(tmp_path):
    model, x = small()
    runner, route = fastcss.one_pass(model), torch.tensor([0, 1, -1])
    with pytest.raises(Exception, match=r"a call with route reads.*adapters="):
        whole(runner)(x, route=route)
    with pytest.raises(RuntimeError, match=r"a call with route reads.*adapters="):
        torch.export.export(runner, (x,), {"route": route})
    with pytest.raises(Exception, match=r"strict=False"):
        torch.export.export(runner, (x,), strict=True)
    with pytest.raises(Exception, match="'vmap' cannot be exported, nor compiled with fullgraph=True"):
        whole(fastcss.one_pass(model, engine="vmap"))(x)
    assert_same(torch.compile(runner, backend="aot_eager")(x, route=route), runner(x, route=route))
    model.save_pretrained(tmp_path)
    loha = peft.LoHaConfig(target_modules=["first"], r=2, init_weights=False)
    peft.get_peft_model(Small(), loha).save_pretrained(tmp_path / "loha")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LoHa runs in turn
        runner = fastcss.one_pass.from_directories(Small().eval(), [tmp_path / "task0", tmp_path / "loha"])
        with pytest.raises(Exception, match=r"read from folders cannot be compiled with fullgraph=True.*load them"):
            whole(runner)(x)
        assert_same(torch.export.export(runner, (x,)).module()(x), runner(x))


@torch.no_grad()
def test_a_compiled_runner_is_not_kept_alive():
    model, x = small()
    runner = fastcss.one_pass(model)
    whole(runner)(x)
    gone = weakref.ref(runner)
    del runner
    torch.compiler.reset()
    gc.collect()
    assert gone() is None
