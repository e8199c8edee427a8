"""Knows PEFT's layers of every kind: which modules they are, what an adapter has in them, and what they cannot do."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn

# These tuners call the model in a way of their own: more than once, or with what their forward finds out before.
OWN_CALLS = ("XLORA", "POLY", "SHADOW")


def why_not_in_layers(adapter: str, config: object, kind: str) -> str | None:
    """Return why an adapter's kind cannot run by PEFT's layers alone, or None if it can."""
    if getattr(config, "is_prompt_learning", False) or kind in ("ADAPTION_PROMPT", "CARTRIDGE", *OWN_CALLS):
        return f"adapter {adapter!r} is {kind}, which works around the model's layers; adapters in its layers run"
    if getattr(config, "alora_invocation_tokens", None):
        return f"adapter {adapter!r} has alora_invocation_tokens, which PeftModel looks for in the input of each call"
    return None


def is_peft_layer(module: nn.Module) -> bool:
    """Tell whether ``module`` is one of PEFT's that has an active adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def adapters_in(layer: nn.Module) -> list[str]:
    """Return the names of the adapters that have weights in one of PEFT's layers."""
    held = (attrgetter(name)(layer) for name in (*layer.adapter_layer_names, *layer.other_param_names))
    return list(dict.fromkeys(adapter for values in held if hasattr(values, "keys") for adapter in values))


def tensors_of(layer: nn.Module, adapter: str) -> list[Tensor]:
    """Return the parameters and buffers that ``adapter`` has in one of PEFT's layers."""
    found: list[Tensor] = []
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        held = attrgetter(name)(layer)
        value = held[adapter] if hasattr(held, "keys") and adapter in held else None
        if isinstance(value, nn.Module):
            found += [*value.parameters(), *value.buffers()]
        elif isinstance(value, Tensor):
            found.append(value)
    return found
