"""Makes a fused model refuse to return attention weights, which fused attention does not store."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from .fused_module import Fused


def refuse_attention_weights(model: nn.Module, replaced: Sequence[Fused]) -> list[RemovableHandle]:
    """Put a hook on each transformers model in ``model`` whose attention weights some of ``replaced`` do not give.

    A module cannot notice the request itself: transformers collects the weights by hooks and from return values.
    """
    silent = {id(module) for module in replaced if not module.gives_weights}
    transformers = sys.modules.get("transformers.modeling_utils")
    if not silent or transformers is None:
        return []
    return [
        part.register_forward_pre_hook(functools.partial(_refuse, _place(part)), with_kwargs=True)
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel) and any(id(module) in silent for module in part.modules())
    ]


def _place(model: nn.Module) -> int:
    """Return the position of ``output_attentions`` among the arguments of ``model``."""
    names = list(inspect.signature(model.forward).parameters)
    return names.index("output_attentions") if "output_attentions" in names else sys.maxsize


def _refuse(place: int, model: nn.Module, args: tuple, kwargs: dict) -> None:
    wanted = kwargs.get("output_attentions", args[place] if place < len(args) else None)
    if wanted is None:
        wanted = getattr(model.config, "output_attentions", False)
    if wanted:
        raise ValueError(
            f"fuse: {type(model).__name__} is asked for output_attentions, and its fused attention stores no weights; "
            "undo() the fusion first"
        )
