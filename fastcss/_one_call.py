"""An op as one call to whoever watches torch's calls (``TorchFunctionMode``), not as the calls that it is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch.overrides import handle_torch_function, has_torch_function

#: What a watcher sees → the op itself, whose own calls it can have a look at by running it.
ONE_CALL: dict[Callable, Callable] = {}


def one_call(op: Callable) -> Callable:
    """``op`` as torch's own functions are: ``__torch_function__`` gets it whole, with its arguments."""

    @functools.wraps(op)
    def call(*args, **kwargs):
        arguments = (*args, *kwargs.values())
        if has_torch_function(arguments):
            return handle_torch_function(call, arguments, *args, **kwargs)
        return op(*args, **kwargs)

    ONE_CALL[call] = op
    return call
