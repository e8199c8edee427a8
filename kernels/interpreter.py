"""What Triton's interpreter computes as a GPU would, by trying: it is not the same in all versions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _round_kernel(x, out, count):
    """``count`` numbers in the dtype of ``out``: an integer that a loop takes from a tensor, and a conversion."""
    for i in range(tl.load(count)):
        tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def why_not(dtype: torch.dtype) -> str | None:
    """None where the interpreter runs kernels on tensors of ``dtype`` and rounds to it as a GPU does, else the reason.

    With NumPy 2.4 that of Triton 3.6 runs none (triton issue 9171), and up to 3.9 all of them cut bfloat16 off.
    """
    name = f"the interpreter of Triton {triton.__version__}"
    x = torch.tensor([1.0, 1.0 + 3 * 2.0**-9, -1.0 - 3 * 2.0**-12])
    rounded = torch.zeros_like(x, dtype=dtype)
    try:
        _round_kernel[(1,)](x, rounded, torch.tensor(len(x)))
    except Exception as error:  # whatever it is: the answer is wanted when fastcss is imported
        return f"{name} runs no kernel here ({error}): another version of Triton may, or an older NumPy"
    if not torch.equal(rounded, x.to(dtype)):
        return f"{name} does not round float32 to {dtype}, it cuts it off: float32 and float16 are what it takes"
    return None
