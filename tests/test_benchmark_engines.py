"""Tests what the benchmarks compare with beside torch: ONNX Runtime and OpenVINO on an exported model, and oneDNN."""

import copy
import glob
import tempfile
from unittest import mock

import left_out
import pytest
import torch
from torch import nn

from benchmarks import _onednn, _onnx, _onnx_runtime, _openvino
from benchmarks.cases import ENGINES, NotInstalled, largest_error

INSTALLED = {name for name in ENGINES if left_out.installed(name, *_onnx.EXPORTER)}

each_engine = pytest.mark.parametrize("engine", [_onnx_runtime, _openvino], ids=lambda engine: engine.NAME)
where_installed = left_out.points(lambda engine: engine.NAME in INSTALLED, "the engine is not installed")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).requires_grad_(False).eval()
    return _onnx.OnnxModel(layers, (torch.randn(50, 64),))


def exact(model, **weights):
    """Compute in float64 what the model must return, with ``weights`` for those of its first layer."""
    layers = copy.deepcopy(model.model).double()
    layers[0].load_state_dict(weights, strict=False)
    return (layers(model.inputs[0].double()),)


def test_every_engine_has_a_file():
    assert (_onnx_runtime.NAME, _openvino.NAME) == ENGINES


def test_what_is_not_installed_is_named():
    with pytest.raises(NotInstalled, match=r"no_such_engine.*\(pip install 'fastcss\[engines\]'\)"):
        _onnx.require("no_such_engine")


@pytest.mark.skipif(not _onednn.is_there(), reason="torch was built without oneDNN")
def test_a_packed_linear_layer_is_that_layer():
    x, weight, bias = torch.randn(50, 64), torch.randn(96, 64), torch.randn(96)
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert largest_error((_onednn.packed_linear(weight, bias, 50)(x),), (expected,)) < 1e-6


@each_engine
@where_installed
def test_an_engine_gives_what_the_model_gives_in_float32(engine, model):
    """OpenVINO by itself computes in bfloat16 where the CPU can."""
    assert largest_error(engine.loaded(model)(), exact(model)) < 1e-6


@each_engine
@where_installed
def test_an_engine_takes_other_weights(engine, model):
    weight = torch.randn(96, 64)
    before = engine.loaded(model)()
    assert largest_error(engine.loaded(model, {"0.weight": weight})(), exact(model, weight=weight)) < 1e-6
    assert torch.equal(engine.loaded(model)()[0], before[0])  # the model has its own again
    with pytest.raises(KeyError, match="no such weight"):
        engine.loaded(model, {"no such weight": torch.zeros(1)})


@each_engine
@where_installed
def test_an_engine_keeps_neither_files_nor_results(engine, model, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = engine.loaded(model)
    assert glob.glob(f"{tmp_path}/*") == []
    first = run()
    kept = first[0].clone()
    run()[0].zero_()
    assert torch.equal(first[0], kept)


@pytest.mark.parametrize("engine", [_onnx_runtime], ids=lambda engine: engine.NAME)
@where_installed
def test_onnx_runtime_has_as_many_threads_as_torch(engine, model):
    import onnxruntime

    with mock.patch.object(onnxruntime, "InferenceSession", wraps=onnxruntime.InferenceSession) as made:
        engine.loaded(model)
    assert made.call_args.args[1].intra_op_num_threads == torch.get_num_threads()


@pytest.mark.parametrize("engine", [_openvino], ids=lambda engine: engine.NAME)
@where_installed
def test_openvino_has_as_many_threads_as_torch(engine, model):
    import openvino

    core = openvino.Core()
    wrapped = mock.Mock(wraps=core)
    with mock.patch.object(openvino, "Core", return_value=wrapped):
        engine.loaded(model)
    settings = wrapped.compile_model.call_args.args[2]
    assert settings["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    with model.file() as path:
        compiled = core.compile_model(str(path), "CPU", settings)
    assert {name: compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS")} == {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
