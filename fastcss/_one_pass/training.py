"""Says which adapters of a runner train: the switch for all of them, and the warning of those that do not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .call_arguments import check_adapters
from .model_copy import ModelCopy
from .peft_layers import is_peft_layer


def set_requires_grad(
    model: nn.Module,
    names: Sequence[str],
    of_folder: Sequence[str],
    adapters: str | Sequence[str] | None,
    requires_grad: bool,
) -> None:
    """Let ``adapters``, of those in ``names``, require gradients in PEFT's layers of ``model``, or no longer.

    PEFT's own layers do it: some of their tensors never train (the fixed matrices of VeRA, MiCA's).
    """
    adapters = [adapters] if isinstance(adapters, str) else adapters
    chosen = [names[task] for task in check_adapters(adapters, tuple(names))]
    read = [name for name in chosen if name in of_folder]
    if read:
        raise TypeError(
            f"one_pass: adapters {', '.join(read)} were read from folders and are no parameters, so nothing trains "
            "them; load them by PEFT (PeftModel.from_pretrained, load_adapter), and give one_pass that model"
        )
    for layer in filter(is_peft_layer, model.modules()):
        layer.set_requires_grad(chosen, requires_grad)


def warn_of_untrained(model_copy: ModelCopy, names: Sequence[str], tasks: Sequence[int]) -> bool:
    """Warn if some of ``tasks`` get no gradients while others do; tell whether that was so."""
    if not model_copy.training or not torch.is_grad_enabled():
        return False
    untrained = [names[t] for t in model_copy.untrained(tasks)]
    if untrained:
        warnings.warn(
            f"one_pass: adapters {', '.join(untrained)} get no gradients, as PEFT lets the active adapter alone "
            f"require them; to train them as well: runner.set_requires_grad({untrained})",
            stacklevel=5,
        )
    return bool(untrained)
