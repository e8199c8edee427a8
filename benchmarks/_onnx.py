"""Exports a model to ONNX for the engines that read it, ``_onnx_runtime`` and ``_openvino``."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from .cases import NotInstalled

#: Both are needed by torch's exporter.
EXPORTER = ("onnx", "onnxscript")

#: Runs a model that an engine has loaded, on the inputs that it was exported with, and returns its outputs.
Run = Callable[[], tuple[Tensor, ...]]


def require(*packages: str) -> None:
    """Raise ``NotInstalled`` for what is not installed of ``packages`` and of what the export needs."""
    missing = [name for name in (*packages, *EXPORTER) if importlib.util.find_spec(name) is None]
    if missing:
        raise NotInstalled(f"{', '.join(missing)} (pip install 'fastcss[engines]')")


class OnnxModel:
    """Holds a model that is exported once, at its first use, for every engine and every set of its weights.

    The export is that of ``torch.export``. The tracing one makes reference points of Grounding DINO float64, which ONNX
    Runtime's ``GridSample`` does not take, and needs several times as long (torch 2.13).

    Args:
        model: its outputs are a tensor or a tuple of tensors.
        inputs: what it is called with, of the sizes that every call has.
        exporting: is entered around the export, to replace what ONNX has no operator for.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        exporting: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.model, self.inputs, self.exporting = model, inputs, exporting

    @functools.cached_property
    def program(self) -> torch.onnx.ONNXProgram:
        from onnxscript import opset18

        def all_true(condition):  # transformers checks sizes by it, and torch's exporter has no translation
            return opset18.Cast(opset18.ReduceMin(opset18.Cast(condition, to=6), keepdims=0), to=9)

        table = {torch.ops.aten._is_all_true.default: all_true}
        # Not optimized, so that every weight has its name; the engines optimize what they read.
        with torch.no_grad(), self.exporting():
            return torch.onnx.export(
                self.model,
                self.inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[f"input{place}" for place in range(len(self.inputs))],
                custom_translation_table=table,
            )

    @contextlib.contextmanager
    def file(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[Path]:
        """Write the model with these ``weights`` in place of its own into a folder that is removed at the end.

        Raises:
            KeyError: the exported model has no such weight.
        """
        import onnx_ir

        values = self.program.model.graph.initializers
        before = {name: values[name].const_value for name in weights or {}}
        try:
            for name, weight in (weights or {}).items():
                values[name].const_value = onnx_ir.tensor(weight.numpy(), name=name)
            with tempfile.TemporaryDirectory(prefix="fastcss-onnx-") as folder:
                self.program.save(Path(folder) / "model.onnx", external_data=True)
                yield Path(folder) / "model.onnx"
        finally:
            for name, value in before.items():
                values[name].const_value = value
