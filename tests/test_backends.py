"""Which implementation runs, and what is said where one cannot."""

from __future__ import annotations

import pytest
import torch

from fastcss import _backends, _nvrtc, ops
from fastcss._info import info


def test_an_implementation_without_a_kernel_for_the_op_is_refused(monkeypatch):
    monkeypatch.setitem(_backends.UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(_backends.KERNELS, "cuda", frozenset({"merge_masks"}))
    with pytest.raises(RuntimeError, match=r"^top_classes: impl='cuda' cannot run: it has no kernel for this op$"):
        ops.top_classes(torch.zeros(1, 3), 1, impl="cuda")
    assert _backends.why_not("cuda", torch.empty(0, device="meta"), "merge_masks").startswith("it runs on cuda")


def test_auto_takes_no_implementation_that_lacks_the_op(monkeypatch):
    monkeypatch.setitem(_backends.UNAVAILABLE, "cpu", None)
    monkeypatch.setitem(_backends.KERNELS, "cpu", frozenset())
    assert _backends.choose("top_classes", "auto", torch.zeros(1, 3)) == "composed"


def test_without_a_compiled_module_the_reason_names_both_ways(monkeypatch):
    monkeypatch.setattr(_backends, "_NO_CUDA_MODULE", "there is no module")
    monkeypatch.setattr(_nvrtc, "why_not", lambda: "there is no CuPy")
    assert _backends._probe_cuda() == (
        "there is no module, and its kernels cannot be compiled at first use: there is no CuPy"
    )


@pytest.mark.parametrize(("module", "way"), [(None, "available, compiled:"), ("none", "available, compiled by CuPy")])
def test_info_says_how_cuda_is_served(monkeypatch, module, way):
    monkeypatch.setattr(_backends, "_NO_CUDA_MODULE", module)
    monkeypatch.setitem(_backends.UNAVAILABLE, "cuda", None)
    monkeypatch.setitem(_backends.KERNELS, "cuda", frozenset({"merge_masks", "prompt_mlp", "prompt_mlp_backward"}))
    line = info()["implementations"]["cuda"]
    assert line.startswith(way)
    assert line.endswith(": merge_masks, prompt_mlp")


def test_every_raw_op_of_the_cuda_sources_has_both_launchers():
    """What csrc/cuda/*.cu registers and what is compiled at first use are the same ops."""
    folder = _nvrtc.folder()
    sources = "".join(path.read_text() for path in folder.glob("*.cu"))
    if not sources:
        pytest.skip("installed without csrc/cuda/*.cu")
    assert {f'"{launcher.__name__}.cuda"' for launcher in _nvrtc.LAUNCHERS} == {
        part.split(",")[0] for part in sources.split("m.impl(")[1:]
    }
