"""Makes an op one call for modes that watch torch's calls (``TorchFunctionMode``), not the calls it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function

from .private_apis import function_mode_is_enabled, function_modes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def one_call(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap ``op`` so that a mode gets it whole, with its arguments, like torch's own functions."""

    @functools.wraps(op)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _watched():
            return handle_torch_function(call, (), *args, **kwargs)
        return op(*args, **kwargs)

    return call


def _watched() -> bool:
    # torch 2.10 can compile only the second of these two questions.
    if not torch.compiler.is_compiling():
        return function_mode_is_enabled()
    return function_modes() > 0
