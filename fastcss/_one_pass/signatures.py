"""Gives a runner the signature of its model's ``forward``, which others read to know what they may pass.

``torch.export`` names the inputs after it, and transformers' Trainer keeps those columns of a data set, and takes for
labels those inputs, that it finds there, on the class.
"""

from __future__ import annotations

import inspect
import types

from torch import nn


def with_signature_of(cls: type[nn.Module], model: nn.Module) -> type[nn.Module]:
    """Return a class that is ``cls`` but for the signature of ``forward``: the model's, with the runner's own options.

    It is ``cls`` itself if the signature of the model's ``forward`` is not known, and is not made anew if it is the
    same.
    """
    plain = unsigned(cls)
    try:
        theirs = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted module's says nothing
        return plain
    own = inspect.signature(plain.forward).parameters
    options = [parameter for parameter in own.values() if parameter.kind is parameter.KEYWORD_ONLY]
    theirs = [
        parameter for parameter in theirs if parameter.name not in own or parameter.kind is parameter.VAR_POSITIONAL
    ]
    rest = [parameter for parameter in theirs if parameter.kind is parameter.VAR_KEYWORD]
    theirs = [parameter for parameter in theirs if parameter.kind is not parameter.VAR_KEYWORD]
    signature = inspect.Signature([own["self"], *theirs, *options, *rest])
    if getattr(cls.forward, "__signature__", None) == signature:
        return cls
    # The function is copied, not wrapped: a call has no more frames, which warnings count.
    code = plain.forward
    forward = types.FunctionType(code.__code__, code.__globals__, code.__name__, code.__defaults__, code.__closure__)
    forward.__kwdefaults__, forward.__doc__, forward.__qualname__ = code.__kwdefaults__, code.__doc__, code.__qualname__
    forward.__module__, forward.__signature__ = code.__module__, signature
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), {**named, "forward": forward, "_unsigned": plain})


def unsigned(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that ``with_signature_of`` made ``cls`` of, or ``cls`` itself."""
    return getattr(cls, "_unsigned", cls)
