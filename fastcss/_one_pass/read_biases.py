"""Reads biases of the base model that an adapter was trained with (``bias="lora_only"``, ``"all"``) from its folder."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .fit_layers import shapes
from .read_adapters import Adapters, LoraWeights, check_base_layer, kind_of
from .read_saved import CALLER, PREFIX


def taken_biases(folder: str, config: dict, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Take the base model's biases out of ``tensors``; return them by the names of their modules."""
    if config.get("bias") in (None, "none"):
        return {}
    modules, found = dict(model.named_modules()), {}
    for key in list(tensors):
        name, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        name = name.removesuffix(".base_layer")
        bias = getattr(modules.get(name), "bias", None)
        if parameter != "bias" or not isinstance(bias, Tensor):
            continue
        own = tensors.pop(key)
        if own.shape != bias.shape:
            raise ValueError(
                f"{CALLER}: {folder}: {key!r} is {list(own.shape)}, and the model's {list(bias.shape)}; the adapter "
                "belongs to another base model"
            )
        found[name] = own.to(bias.device, bias.dtype)  # PEFT loads it into the model's own
    return found


def give_biases(adapters: Adapters, adapter: str, biases: dict[str, Tensor], model: nn.Module) -> None:
    """Give an adapter that is in ``adapters`` its biases: in its layers, and in modules without other parts of it."""
    task = adapters.names.index(adapter)
    for name, own in biases.items():
        module = model.get_submodule(name)
        weights = adapters.layers.get(name, [None] * len(adapters.names))[task]
        if weights is None and kind_of(module) not in ("linear", "conv2d"):
            adapters.save(name, adapter, {"bias": own})
            continue
        check_base_layer(name, module)
        weights = _nothing(module) if weights is None else weights
        adapters.add(name, adapter, dataclasses.replace(weights, base_bias=own.to(weights.a.dtype)))


def _nothing(base: nn.Module) -> LoraWeights:
    """Return weights of rank 1 for ``base`` that add nothing."""
    dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
    of_a, (of_b, *_) = shapes(kind_of(base), base, 1)
    return LoraWeights(base.weight.new_zeros(of_a, dtype=dtype), base.weight.new_zeros(of_b, dtype=dtype), 0.0)


def check_not_nested(adapters: Adapters) -> None:
    """Raise if a module that one adapter has for itself lies in another's, or is made of modules with adapters."""
    for name, own in adapters.saved.items():
        only_bias = any(tensors is not None and tensors.keys() == {"bias"} for tensors in own)
        others = [*adapters.saved, *(adapters.layers if only_bias else ())]
        inside = next((other for other in others if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise TypeError(
                f"{CALLER}: adapters have {name!r} for themselves (modules_to_save, bias), and {inside!r}, which lies "
                "in it; load them by PEFT, and give one_pass that"
            )
