"""Hooks on a model's modules: those that the copy takes over, and whether there are any of the user's."""

from __future__ import annotations

from itertools import chain

from torch import nn

from .._fuse.fused_module import HOOKS
from .adapted_layer import Adapted
from .read_adapters import is_made_by
from .structural_copy import StructuralCopy, holds_hooks


def take_hooks(layer: nn.Module, ours: Adapted, copy: StructuralCopy) -> None:
    """Let the hooks on PEFT's layer run around what stands for it."""
    hooks = {name: value for name, value in vars(layer).items() if holds_hooks(name, value)}
    vars(ours).update((name, copy.hooks(value)) for name, value in hooks.items())
    ours._is_full_backward_hook = layer._is_full_backward_hook
    ours.training = layer.training


def has_own_hooks(module: nn.Module) -> bool:
    """Of the user's: transformers' own collect a model's outputs, and leave it to us to give them a task axis."""
    hooks = chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    return not all(is_made_by(hook, ("transformers.", "fastcss.")) for hook in hooks)
