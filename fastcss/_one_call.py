"""An op as one call to whoever watches torch's calls (``TorchFunctionMode``), not as the calls that it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function


def one_call(op: Callable) -> Callable:
    """``op`` as torch's own functions are: a mode gets it whole, with its arguments."""

    @functools.wraps(op)
    def call(*args, **kwargs):
        if torch._C._is_torch_function_mode_enabled():
            return handle_torch_function(call, (), *args, **kwargs)
        return op(*args, **kwargs)

    return call
