"""Which implementations an op's tests run on, and its calls in any shape and layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcss._dispatch import backends
from fastcss.selftest.comparison import Call, assert_as_good_as_eager, normal  # noqa: F401  of every op's tests

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = ("cpu", "triton")
IMPLEMENTATIONS = ("composed", *COMPILED)
#: Of the ops that have a kernel in CUDA C++, too.
COMPILED_CUDA = (*COMPILED, "cuda")
IMPLEMENTATIONS_CUDA = (*IMPLEMENTATIONS, "cuda")


def runs(op: Callable, impl: str, device: str, light: bool = True) -> str:
    """``impl``, or skip this test with the reason why it does not run here.

    Triton's interpreter, some thousand times slower than a GPU, takes only the ``light`` points of a test.
    """
    reason = backends.why_not(impl, torch.empty(0, device=device))
    if reason is None and impl == "triton" and device == "cpu" and not light:
        reason = f"{op.__name__} has enough points without this one in Triton's interpreter"
    if reason:
        pytest.skip(f"{impl}: {reason}")
    return impl


# --- strides ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "NCHW": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "a slice": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded batch": lambda t: t[:1].expand(t.shape),
    "expanded rows": lambda t: t[..., :1, :].expand(t.shape),
}


def laid_out(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A row alone as the first of a matrix."""
    return change(tensor[None])[0] if tensor.dim() == 1 else change(tensor)


def check_any_shape_and_stride(
    make: Callable[..., Call],
    shapes: st.SearchStrategy,
    impl: str,
    tolerance: float,
    examples: int,
    compare: Callable[[Call, str, float], None] = assert_as_good_as_eager,
) -> None:
    """``make(*shape, seed=…)`` for any shape, its tensors in any layout that keeps the values."""
    layouts = st.sampled_from([lambda t: t, *(change for name, change in LAYOUTS.items() if "expanded" not in name)])

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(shapes, st.integers(0, 2**31), st.lists(layouts, min_size=5, max_size=5))
    def check(shape, seed, changes):
        call = make(*shape, seed=seed)
        pairs = zip(call.tensors.items(), changes, strict=False)
        compare(call.having(**{name: laid_out(t, change) for (name, t), change in pairs}), impl, tolerance)

    check()
