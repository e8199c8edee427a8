"""Says which implementations an op's tests run on, and makes its calls in any shape and layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from left_out import points, runnable
from torch import Tensor

from fastcss._dispatch import backends
from fastcss.selftest.comparison import Call, assert_as_good_as_eager, normal  # noqa: F401  of every op's tests

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The implementations that are tested here: those with kernels, and all.
COMPILED = runnable("cpu", "triton")
IMPLEMENTATIONS = ("composed", *COMPILED)
#: The same for ops that have a kernel in CUDA C++, too.
COMPILED_CUDA = (*COMPILED, *runnable("cuda"))
IMPLEMENTATIONS_CUDA = ("composed", *COMPILED_CUDA)
NOT_OF_64_BITS = points(
    lambda impl, dtype: dtype != torch.float64 or impl not in COMPILED_CUDA, "there are no kernels of float64"
)


def runs(impl: str, device: str) -> str:
    """``impl``, or skip this test with the reason why it does not run here."""
    reason = backends.why_not(impl, torch.empty(0, device=device))
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
