"""An op as one call to whoever watches torch's calls (``TorchFunctionMode``), not as the calls that it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function

from .private_apis import function_mode_is_enabled, function_modes


def one_call(op: Callable) -> Callable:
    """``op`` as torch's own functions are: a mode gets it whole, with its arguments."""

    @functools.wraps(op)
    def call(*args, **kwargs):
        if _watched():
            return handle_torch_function(call, (), *args, **kwargs)
        return op(*args, **kwargs)

    return call


def _watched() -> bool:
    # Of the two questions torch 2.10 can compile only the second.
    if not torch.compiler.is_compiling():
        return function_mode_is_enabled()
    return function_modes() > 0
