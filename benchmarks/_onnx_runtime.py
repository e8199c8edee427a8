"""Runs a model in ONNX Runtime, on its CPU provider and as many threads as torch has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import _onnx

NAME = "onnxruntime"


def loaded(model: _onnx.OnnxModel, weights: Mapping[str, Tensor] | None = None) -> _onnx.Run:
    """Load the model with these weights in place of its own; loading optimizes the graph and packs the weights."""
    _onnx.require(NAME)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    # Its threads spin while they wait for work, and would take a core from the provider whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with model.file(weights) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, model.inputs, strict=True)}
    return lambda: tuple(map(torch.from_numpy, session.run(None, feeds)))
