"""Fits the LoRA weights of a folder to the layers of a model: their shapes, rank, scale, dtype and device."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from .pissa_olora import with_taken_out
from .read_adapters import Adapters, LoraWeights, check_base_layer, is_conv1d, kind_of
from .read_saved import CALLER, CONFIG_FILE, fits_still


def fit(where: str, base: nn.Module, tensors: dict[str, Tensor], config: dict, layer: str) -> LoraWeights:
    """Make of one layer's ``tensors`` what the pass runs; refuse what does not fit ``base``, which is at ``where``."""
    scale = scale_of(where, base, tensors, config, layer)
    # PEFT loads adapters in float32, whatever was saved, and beside a float64 layer in float64.
    dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
    a, b, bias, magnitude = (tensors.get(part) for part in ("a", "b", "bias", "magnitude"))
    weights = LoraWeights(a, b, scale, bias, float(config.get("lora_dropout", 0.0)), magnitude=magnitude)
    weights = weights.to(base.weight.device, dtype)
    try:
        return with_taken_out(weights, base, config.get("init_lora_weights"))
    except TypeError as error:
        raise TypeError(f"{CALLER}: {where} has {error}") from error


def scale_of(where: str, base: nn.Module, tensors: dict[str, Tensor], config: dict, layer: str) -> float:
    """Return the scale of one layer's adapter; refuse ``tensors`` that do not fit ``base``, by their shapes alone."""
    kind = kind_of(base)
    if kind is None:
        raise TypeError(
            f"{CALLER}: {where} is {type(base).__name__}; LoRA on Linear, Conv1D, Conv2d and Embedding runs in one pass"
        )
    check_base_layer(layer, base)
    if not {"a", "b"} <= tensors.keys():
        raise ValueError(f"{CALLER}: {where} has only one half of its LoRA pair")
    a, b, bias = tensors["a"], tensors["b"], tensors.get("bias")
    if (bias is not None) != bool(config.get("lora_bias")):
        held, said = "no bias" if bias is None else "a bias", bool(config.get("lora_bias"))
        raise ValueError(f"{CALLER}: {where} holds {held} of B, but lora_bias is {said} in {CONFIG_FILE}")
    if not a.numel() or not b.numel():
        raise ValueError(
            f"{CALLER}: {where} is empty, {list(a.shape)} and {list(b.shape)}: saved from a sharded model (DeepSpeed "
            "ZeRO-3, FSDP) without gathering its weights"
        )
    rank = a.shape[0]
    wanted_a, wanted_b = shapes(kind, base, rank)
    if tuple(a.shape) != wanted_a or tuple(b.shape) not in wanted_b or (bias is not None and bias.shape != b.shape[:1]):
        raise ValueError(
            f"{CALLER}: {where} wants A {list(wanted_a)} and B {' or '.join(str(list(w)) for w in wanted_b)} at rank "
            f"{rank}, the folder holds {list(a.shape)} and {list(b.shape)}; the adapter belongs to another base model"
        )
    magnitude = tensors.get("magnitude")
    if (magnitude is not None) != bool(config.get("use_dora")):
        held, said = "no" if magnitude is None else "a", bool(config.get("use_dora"))
        raise ValueError(
            f"{CALLER}: {where} holds {held} lora_magnitude_vector, but use_dora is {said} in {CONFIG_FILE}"
        )
    if magnitude is not None and magnitude.numel() != b.shape[0]:
        raise ValueError(
            f"{CALLER}: {where} has {b.shape[0]} outputs, and its lora_magnitude_vector in the folder is "
            f"{list(magnitude.shape)}"
        )
    if rank != _of_pattern(config.get("rank_pattern"), layer, config.get("r", 8)):
        raise ValueError(f"{CALLER}: {where} is of rank {rank}, its {CONFIG_FILE} (r, rank_pattern) says another")
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def fitted_again(model: nn.Module, adapters: Adapters) -> Adapters:
    """Fit adapters that were read from folders to ``model`` as it is now, on its device.

    The model's own adapters may be on its layers, too.
    """
    modules, again = dict(model.named_modules()), Adapters.empty(adapters.names)
    for layer, weights in adapters.layers.items():
        base = modules.get(layer)
        base = getattr(base, "base_layer", base)
        kind = None if base is None else kind_of(base)
        if kind is None:
            raise ValueError(f"one_pass: the model has no layer {layer!r} any more that its adapters fit")
        check_base_layer(layer, base)
        for adapter, w in zip(adapters.names, weights, strict=True):
            if w is None:
                continue
            wanted_a, (wanted_b, *_) = shapes(kind, base, w.a.shape[0])
            if w.a.shape != wanted_a or w.b.shape[0] != wanted_b[0]:
                raise ValueError(f"one_pass: layer {layer!r} has another size now, which {adapter!r} does not fit")
            again.add(layer, adapter, w.to(base.weight.device))
    for name, own in adapters.saved.items():
        for adapter, tensors in zip(adapters.names, own, strict=True):
            if tensors is not None:
                again.save(name, adapter, fits_still(name, adapter, tensors, modules.get(name)))
    return again


def shapes(kind: str, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the shape of A, and the shapes that B may have."""
    if kind == "embedding":
        return (rank, base.num_embeddings), ((base.embedding_dim, rank),)
    if kind == "conv2d":  # peft before 0.16 has a dense B beside grouped convolutions too
        inner = dict.fromkeys((rank // base.groups if rank % base.groups == 0 else rank, rank))
        return (rank, base.in_channels, *base.kernel_size), tuple((base.out_channels, r, 1, 1) for r in inner)
    width_out, width_in = base.weight.shape[::-1] if is_conv1d(base) else base.weight.shape
    return (rank, width_in), ((width_out, rank),)


def _of_pattern(patterns: dict | None, layer: str, default: float) -> float:
    """Apply PEFT's rank_pattern/alpha_pattern rule: the first pattern wins that is the layer's name or its end."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
