"""Handles hooks on a model's modules: gives them to the copy, and finds those of the user."""

from __future__ import annotations

from itertools import chain

from torch import nn

from .._fuse.fused_module import HOOKS, is_made_by
from .structural_copy import StructuralCopy, holds_hooks


def take_hooks(layer: nn.Module, ours: nn.Module, copy: StructuralCopy) -> None:
    """Let the hooks on PEFT's layer run around the layer that replaces it."""
    hooks = {name: value for name, value in vars(layer).items() if holds_hooks(name, value)}
    vars(ours).update((name, copy.hooks(value)) for name, value in hooks.items())
    ours._is_full_backward_hook = layer._is_full_backward_hook
    ours.training = layer.training


def has_own_hooks(module: nn.Module) -> bool:
    """Tell whether ``module`` has hooks of the user.

    transformers' own hooks do not count: they collect a model's outputs, which get their task axis from the runner.
    """
    hooks = chain.from_iterable(getattr(module, name).values() for name in HOOKS)
    return not all(is_made_by(hook, ("transformers.", "fastcss.")) for hook in hooks)
