"""Tells whether the values of a tensor can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from .private_apis import DispatchModeKey, dispatch_mode, is_wrapped


def readable(tensor: Tensor) -> bool:
    """Tell whether the values can be read without a stall: not on CUDA, not while anything traces, not under vmap."""
    return (
        tensor.device.type == "cpu"
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_wrapped(tensor)
        and dispatch_mode(DispatchModeKey.PROXY) is None  # make_fx sets it, and with it torch.func.linearize
        and dispatch_mode(DispatchModeKey.FAKE) is None
    )
