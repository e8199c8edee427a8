"""Runs a model in OpenVINO, on its CPU device and as many threads as torch has, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _onnx

NAME = "openvino"


def loaded(model: _onnx.OnnxModel, weights: Mapping[str, Tensor] | None = None) -> _onnx.Run:
    """Compile the model with these weights in place of its own."""
    _onnx.require(NAME)
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        # By default it computes a float32 model in bfloat16 where the CPU has instructions for that.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with model.file(weights) as path:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    arrays = [tensor.numpy() for tensor in model.inputs]

    def run() -> tuple[Tensor, ...]:
        results = request.infer(arrays, share_inputs=True)  # without a copy of the inputs, as for torch
        return tuple(torch.from_numpy(results[output]) for output in compiled.outputs)

    return run
