"""Tests every op on every implementation that can run here: values, gradients, and the same bits again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcss._dispatch import backends
from fastcss.selftest.comparison import TOLERANCES, Call, assert_as_good_as_eager
from fastcss.selftest.inputs import CALLS

#: Each entry is an implementation and the device it is to run on.
PLACES = [
    ("composed", "cpu"),
    ("cpu", "cpu"),
    ("composed", "cuda"),
    ("triton", "cpu" if backends.interpreting() else "cuda"),
    ("cuda", "cuda"),
]


def why_not(impl: str, device: str, dtype: torch.dtype, op: str) -> str | None:
    """Return why ``impl`` cannot run ``op`` on tensors of ``dtype`` on ``device``, or None if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return backends.UNAVAILABLE[impl] or "there is no CUDA device"
    return backends.why_not(impl, torch.empty(0, device=device, dtype=dtype), op)


def make(name: str, impl: str, device: str, dtype: torch.dtype, record_property) -> Call:
    """Make the call, or skip the test with the reason why it cannot run; note its cell in the table after the tests."""
    record_property("cell", (name, f"{impl} on {device}"))
    reason = why_not(impl, device, dtype, name.partition(",")[0])
    if reason:
        pytest.skip(reason)
    return CALLS[name]().map(lambda tensor: tensor.to(device)).leaves(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, impl, device, dtype, record_property):
    assert_as_good_as_eager(make(name, impl, device, dtype, record_property), impl, TOLERANCES[dtype])


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_again(name, impl, device, threads, record_property):
    """The C++ kernels give the same bits on several threads, too."""
    call = make(name, impl, device, torch.float32, record_property)
    dys = call.output_gradients()
    first = call.results(impl, dys)
    if impl == "cpu":
        torch.set_num_threads(max(2, threads))
    again = call.leaves().results(impl, dys)
    for result, tensor in first.items():
        assert torch.equal(again[result], tensor), result


@pytest.mark.parametrize(
    ("module", "reason"), [("_cpu", backends.UNAVAILABLE["cpu"]), ("_cuda", backends._NO_CUDA_MODULE)]
)
def test_a_compiled_module_that_is_there_loads(module, reason):
    there = (Path(backends.__file__).parents[1] / f"{module}.abi3.so").exists()
    if not there or (module == "_cuda" and torch.version.cuda is None):
        pytest.skip(reason)
    assert reason is None
