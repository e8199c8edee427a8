"""Whether the values of a tensor can be read."""

from __future__ import annotations

import torch
from torch import Tensor

_MODES = torch._C._TorchDispatchModeKey


def readable(tensor: Tensor) -> bool:
    """Its values can be read without a stall: not on CUDA, not while anything traces, not under vmap."""
    return (
        tensor.device.type == "cpu"
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._get_dispatch_mode(_MODES.PROXY) is None  # of make_fx, and with it of torch.func.linearize
        and torch._C._get_dispatch_mode(_MODES.FAKE) is None
    )
