"""Tests which implementation runs, and what is said if one cannot."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from fastcss import _launchers, ops
from fastcss._dispatch import backends, nvrtc
from fastcss._dispatch.info import info


def test_an_implementation_without_a_kernel_for_the_op_is_refused(monkeypatch):
    monkeypatch.setitem(backends.UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(backends.KERNELS, "cuda", frozenset({"merge_masks"}))
    with pytest.raises(RuntimeError, match=r"^top_classes: impl='cuda' cannot run: it has no kernel for this op$"):
        ops.top_classes(torch.zeros(1, 3), 1, impl="cuda")
    assert backends.why_not("cuda", torch.empty(0, device="meta"), "merge_masks").startswith("it runs on cuda")


def test_kernels_that_had_to_be_compiled_are_tested(device):
    """If the kernels are missing, no test has a case of them: ``make test`` says that they have to be there."""
    if os.environ.get("FASTCSS_REQUIRE_COMPILED") == "1":
        assert backends.UNAVAILABLE[device] is None


def test_auto_takes_no_implementation_that_lacks_the_op(monkeypatch):
    monkeypatch.setitem(backends.UNAVAILABLE, "cpu", None)
    monkeypatch.setitem(backends.KERNELS, "cpu", frozenset())
    assert backends.choose("top_classes", "auto", torch.zeros(1, 3)) == "composed"


def test_without_a_compiled_module_the_reason_names_both_ways(monkeypatch):
    monkeypatch.setattr(backends, "_NO_CUDA_MODULE", "there is no module")
    monkeypatch.setattr(nvrtc, "why_not", lambda: "there is no CuPy")
    assert backends._probe_cuda() == (
        "there is no module, and its kernels cannot be compiled at first use: there is no CuPy"
    )


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_nvrtc_is_named(monkeypatch, tmp_path, missing):
    """CuPy without the extra [ctk] has none and says so, as cupy-cuda13x 14.2 does, at the first kernel only."""
    for name in ("cupy", "cupy_backends", "cupy_backends/cuda", "cupy_backends/cuda/libs"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "__init__.py").touch()
    error = 'raise RuntimeError("Failure finding \\"libnvrtc.so.13\\": No such file\\n")'
    (tmp_path / "cupy_backends/cuda/libs/nvrtc.py").write_text(
        f"def getVersion():\n    {error if missing else 'return 13, 0'}\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupy_backends")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = nvrtc.why_not()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupy_backends")]:
        monkeypatch.delitem(sys.modules, name)
    if missing:
        assert reason == (
            'CuPy finds no NVRTC (Failure finding "libnvrtc.so.13": No such file): '
            "install it with the extra that has it, cupy-cuda13x[ctk]"
        )
    else:
        assert reason is None


@pytest.mark.parametrize(("module", "way"), [(None, "available, compiled:"), ("none", "available, compiled by CuPy")])
def test_info_says_how_cuda_is_served(monkeypatch, module, way):
    monkeypatch.setattr(backends, "_NO_CUDA_MODULE", module)
    monkeypatch.setitem(backends.UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(backends.KERNELS, "cuda", frozenset({"merge_masks", "prompt_mlp", "prompt_mlp_backward"}))
    line = info()["implementations"]["cuda"]
    assert line.startswith(way)
    assert line.endswith(": merge_masks, prompt_mlp")


@pytest.fixture
def interpreter(device):
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("Triton's interpreter runs with --device cpu")
    from fastcss.kernels import interpreter

    return interpreter


def test_an_interpreter_that_runs_no_kernel_is_refused(interpreter, monkeypatch):
    """Triton 3.6's interpreter is like that with NumPy 2.4."""
    assert interpreter.why_not(torch.float32) is None

    def fails(*arguments):
        raise TypeError("only 0-dimensional arrays can be converted")

    monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_masked_load", fails)
    reason = interpreter.why_not(torch.float32)
    assert reason.startswith("the interpreter of Triton ")
    assert "only 0-dimensional arrays can be converted" in reason


def test_an_interpreter_that_cuts_off_is_refused_for_that_dtype(interpreter, monkeypatch):
    """The interpreters of Triton 3.6 to 3.9 are like that."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    assert interpreter.why_not(torch.bfloat16) is None
    cast = InterpreterBuilder.cast_impl

    def cuts(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle((src.data.view("uint32") >> 16).astype("uint16"), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cuts)
    assert interpreter.why_not(torch.float16) is None
    reason = interpreter.why_not(torch.bfloat16)
    assert "does not round float32 to torch.bfloat16" in reason
    monkeypatch.setitem(backends._NOT_INTERPRETED, torch.bfloat16, reason)
    for dtype in (torch.float32, torch.float16):
        ops.top_classes(torch.zeros(1, 3, dtype=dtype), 1, impl="triton")
    with pytest.raises(RuntimeError, match="top_classes: impl='triton' cannot run: the interpreter of Triton"):
        ops.top_classes(torch.zeros(1, 3, dtype=torch.bfloat16), 1, impl="triton")


def test_every_raw_op_of_the_cuda_sources_has_both_launchers(monkeypatch):
    """csrc/cuda/*.cu must register the same ops as are compiled at first use."""
    sources = "".join(path.read_text() for path in nvrtc.folder().glob("*.cu"))
    if not sources:
        pytest.skip("installed without csrc/cuda/*.cu")
    given = []
    monkeypatch.setattr(_launchers, "LIBRARY", SimpleNamespace(impl=lambda *arguments: given.append(arguments)))
    monkeypatch.setattr(backends, "_NO_CUDA_MODULE", "there is no module")
    monkeypatch.setattr(nvrtc, "why_not", lambda: None)
    assert backends._probe_cuda() is None
    assert {key for _, _, key in given} == {"CUDA"}
    assert {f'"{op}"' for op, _, _ in given} == {part.split(",")[0] for part in sources.split("m.impl(")[1:]}


def test_a_second_launcher_of_an_op_is_refused():
    def merge_masks():
        """Stands for a launcher in another file."""

    with pytest.raises(RuntimeError, match=r"^merge_masks has a launcher already, in fastcss\._launchers"):
        nvrtc.launcher(merge_masks)
    assert _launchers.LAUNCHERS["merge_masks"] is not merge_masks
