"""Finds by trying what Triton's interpreter computes as a GPU would: that differs between its versions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _round_kernel(x, out, count):
    """Convert ``count`` numbers to the dtype of ``out``, in a loop that takes its bound from a tensor: both are
    tried."""
    for i in range(tl.load(count)):
        tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def why_not(dtype: torch.dtype) -> str | None:
    """Return None if the interpreter runs kernels on tensors of ``dtype`` and rounds to it as a GPU does; else why not.

    The interpreter of Triton 3.6 runs none with NumPy 2.4 (triton issue 9171), and up to Triton 3.9 it cuts bfloat16
    off instead of rounding.
    """
    name = f"the interpreter of Triton {triton.__version__}"
    x = torch.tensor([1.0, 1.0 + 3 * 2.0**-9, -1.0 - 3 * 2.0**-12])
    rounded = torch.zeros_like(x, dtype=dtype)
    try:
        _round_kernel[(1,)](x, rounded, torch.tensor(len(x)))
    except Exception as error:  # any error is an answer, which is wanted when fastcss is imported
        return f"{name} runs no kernel here ({error}): another version of Triton may, or an older NumPy"
    if not torch.equal(rounded, x.to(dtype)):
        return f"{name} does not round float32 to {dtype}, it cuts it off: float32 and float16 are what it takes"
    return None
