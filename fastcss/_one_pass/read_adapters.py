"""Reads LoRA adapters from the layers of a PEFT model into the form that one pass takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._dispatch.private_apis import compiled_from
from .._fuse.fused_module import HOOKS, is_made_by, original_class
from .peft_layers import adapters_in, is_peft_layer, why_not_in_layers

# These variants of PEFT have a form here. MiCA's differ from plain LoRA only in how they begin and what of them trains.
VARIANTS = (
    *("MiCALinearVariant", "MiCAEmbeddingVariant"),
    *("DoraLinearVariant", "DoraConv2dVariant", "DoraEmbeddingVariant"),
)
_PAIRS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """Holds one adapter on one layer, as PEFT keeps it.

    Attributes:
        a: ``[r, K]`` (linear), ``[r, C, kh, kw]`` (convolution) or ``[r, V]`` (embedding).
        b: ``[N, r]``, for a convolution ``[N, r / groups, 1, 1]``, or ``[N, r, 1, 1]`` in peft before 0.16.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``[N]``, the bias of ``b``, if the adapter has one.
        dropout: probability of dropping an input of ``a`` in training.
        drops: PEFT's dropout module, which drops while it is in training mode; with None the layer's mode decides.
        magnitude: DoRA's, ``[N]``, or ``[1, N, 1, 1]`` for a convolution; None for plain LoRA.
        base_bias: ``[N]``, the adapter's in place of the base layer's bias (``bias="lora_only"`` or ``"all"``).
        taken_out: how many of the last rows of ``a`` do not belong to the adapter. They subtract the part that PEFT
            takes out of the base layer when such an adapter begins (PiSSA, OLoRA); their input is never dropped.
    """

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    dropout: float = 0.0
    drops: nn.Module | None = None
    taken_out: int = 0
    magnitude: Tensor | None = None
    base_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        held = (self.a, self.b, self.bias, self.magnitude, self.base_bias)
        return [tensor for tensor in held if tensor is not None]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LoraWeights:
        parts = {part: getattr(self, part) for part in ("a", "b", "bias", "magnitude", "base_bias")}
        parts = {part: tensor.to(device, dtype) for part, tensor in parts.items() if tensor is not None}
        return dataclasses.replace(self, **parts)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Holds T named adapters of one model.

    Attributes:
        names: the adapters' names.
        layers: for every layer with LoRA on it, each adapter's weights, or None if it has none.
        saved: for every module that an adapter was saved with whole, each adapter's: the tensors of its state_dict
            from a folder, or True for a module in PEFT's wrapper; None if it has none.
        made_of: weights of the model that PEFT has made parts of the adapters of; other values want other adapters.
    """

    names: tuple[str, ...]
    layers: dict[str, list[LoraWeights | None]]
    saved: dict[str, list[dict[str, Tensor] | bool | None]] = dataclasses.field(default_factory=dict)
    made_of: tuple[Tensor, ...] = ()

    @classmethod
    def empty(cls, names: Sequence[str]) -> Adapters:
        return cls(tuple(names), {})

    def add(self, layer: str, adapter: str, weights: LoraWeights) -> None:
        self.layers.setdefault(layer, [None] * len(self.names))[self.names.index(adapter)] = weights

    def save(self, module: str, adapter: str, own: dict[str, Tensor] | bool) -> None:
        self.saved.setdefault(module, [None] * len(self.names))[self.names.index(adapter)] = own


def kind_of(module: nn.Module) -> str | None:
    """Return "linear", "conv2d" or "embedding" for a base layer that one pass can run, None for any other.

    A weight of another library's class (torchao's quantised ones, DTensor) is that library's to compute with.
    """
    if hasattr(getattr(module, "weight", None), "__tensor_flatten__"):
        return None
    cls = original_class(module)
    if cls in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear) or is_conv1d(module):
        return "linear"
    return {nn.Conv2d: "conv2d", nn.Embedding: "embedding"}.get(cls)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether ``module`` is transformers' Conv1D: a linear layer that keeps its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# ------------------------------------------------------------------------------------------------ a PEFT model


def read_peft(model: nn.Module) -> tuple[nn.Module, Adapters]:
    """Return the base model inside ``model``, with its adapted layers in place, and its adapters."""
    try:
        from peft import PeftMixedModel, PeftModel
        from peft.utils.other import ModulesToSaveWrapper
    except ImportError as error:
        raise ImportError(
            "one_pass: a PEFT model needs the package peft; one_pass.from_directories does not"
        ) from error

    model = compiled_from(model) or model
    configs = getattr(model, "peft_config", {})
    kinds = {adapter: getattr(config.peft_type, "value", config.peft_type) for adapter, config in configs.items()}
    for adapter, config in configs.items():
        why = why_not_in_layers(adapter, config, kinds[adapter])
        if why:
            raise TypeError(f"one_pass: {why}")
    is_peft = isinstance(model, (PeftModel, PeftMixedModel))
    for around in (model, model.base_model) if is_peft else ():
        if _has_own_calls(around) or not type(around).forward.__module__.startswith("peft."):
            raise TypeError(
                f"one_pass: the {type(around).__name__} around the model has hooks or a replaced forward, which one "
                "pass would skip; hooks on the model itself (model.get_base_model()) and on the runner run"
            )
    # get_base_model() would fail if the active adapter was deleted.
    base = model.base_model.model if is_peft else model
    if isinstance(model, PeftModel) and type(model) is not PeftModel and "ADALORA" in kinds.values():
        base = model.base_model  # it adds to the loss
    layers = {name: module for name, module in base.named_modules() if is_peft_layer(module)}
    if not layers:
        raise ValueError(f"one_pass: {type(model).__name__} has no adapted layer; it wants a model with PEFT adapters")
    wrappers = {name: layer for name, layer in layers.items() if isinstance(layer, ModulesToSaveWrapper)}
    names = list(configs) or list(dict.fromkeys(a for layer in layers.values() for a in adapters_in(layer)))
    adapters = Adapters.empty(names)
    plain = _plain_lora(layers)
    _check_not_merged({name: layer for name, layer in layers.items() if name not in wrappers})
    for name, layer in plain.items():
        _check_peft_layer(name, layer)
        for adapter in _adapters_of(layer):
            _check_whole(name, layer, adapter, names)
            adapters.add(name, adapter, _read_peft_layer(layer, adapter))
    for name, wrapper in wrappers.items():
        if "forward" in vars(wrapper) or parametrize.is_parametrized(wrapper):
            raise TypeError(f"one_pass: {name!r}, which is saved whole, has a replaced forward, which would be skipped")
        for adapter in wrapper.modules_to_save:
            adapters.save(name, adapter, True)
    return base, adapters


def read_adapter(layers: Mapping[str, nn.Module], adapter: str) -> Adapters | None:
    """Read one adapter from PEFT's LoRA layers, all else in which was read before; None if it is no plain LoRA."""
    found = Adapters.empty([adapter])
    for name, layer in layers.items():
        holders = {inner: holder for inner, holder in layer._modules.items() if inner != "base_layer"}
        if not any(adapter in holders[part] for part in _PAIRS):
            continue
        _check_whole(name, layer, adapter, [adapter])
        variant = layer.lora_variant.get(adapter)
        if not (variant is None or type(variant).__name__ in VARIANTS):
            return None
        parts = ((inner, holder._modules.get(adapter)) for inner, holder in holders.items())
        for inner, part in parts:
            if part is not None:
                _check_part(name, f"{inner}.{adapter}", part)
        found.layers[name] = [_read_peft_layer(layer, adapter)]
    return found if found.layers else None


def check_global_hooks() -> None:
    """Raise if a global hook is set that is not torch's own (its counter of FLOPs, its profilers)."""
    for hooks in map(torch.nn.modules.module.__dict__.get, GLOBAL_HOOKS):
        if hooks and not all(is_made_by(hook, ("torch.",)) for hook in hooks.values()):
            raise TypeError(
                "one_pass: there is a hook for all modules (torch.nn.modules.module.register_module_forward_hook and "
                "the like), which would not see the modules inside of PEFT's layers; put it on those that it is for"
            )


def _adapters_of(layer) -> list[str]:
    return list(dict.fromkeys(adapter for part in _PAIRS for adapter in getattr(layer, part, ())))


def _check_whole(name: str, layer, adapter: str, names: Sequence[str]) -> None:
    """Raise if the layer holds the remains of an ``add_adapter`` that failed half-way."""
    kind = "lora_embedding_" if isinstance(layer.base_layer, nn.Embedding) else "lora_"
    parts = (f"{kind}A", f"{kind}B", "scaling", "lora_dropout")
    missing = [part for part in parts if adapter not in getattr(layer, part)]
    if missing or adapter not in names:
        what = f"has no {', '.join(missing)}" if missing else f"is none of the model's adapters ({', '.join(names)})"
        raise ValueError(
            f"one_pass: layer {name!r}, adapter {adapter!r}: it {what}, as an add_adapter that failed half-way leaves "
            f"it; call delete_adapter({adapter!r}) of this layer and of every other that holds it"
        )


def _plain_lora(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return those of PEFT's ``layers`` that have a form of their own here, and are in no other that runs in turn."""
    from peft.utils.other import ModulesToSaveWrapper

    plain = {name: layer for name, layer in layers.items() if _is_plain_lora(layer)}
    others = {name: layer for name, layer in layers.items() if name not in plain}
    around = tuple(f"{name}." for name, layer in others.items() if not isinstance(layer, ModulesToSaveWrapper))
    return {name: layer for name, layer in plain.items() if not name.startswith(around)}


def _is_plain_lora(layer: nn.Module) -> bool:
    from peft.tuners import lora

    kinds = {lora.Linear: "linear", lora.Conv2d: "conv2d", lora.Embedding: "embedding"}
    kind = kinds.get(type(layer))
    if kind is None or kind != kind_of(layer.base_layer):
        return False
    variants = (type(variant).__name__ for variant in layer.lora_variant.values())
    return all(variant in VARIANTS for variant in variants)


def _check_not_merged(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(
                f"one_pass: layer {name!r} has merged adapters {layer.merged_adapters}; unmerge them first "
                "(model.unmerge_adapter())"
            )


def _check_peft_layer(name: str, layer) -> None:
    if "forward" in vars(layer) or parametrize.is_parametrized(layer):
        raise TypeError(f"one_pass: layer {name!r} has a replaced forward or is parametrized, which would be skipped")
    check_base_layer(name, layer.base_layer)
    _check_not_merged({name: layer})
    for inner, module in layer.named_modules():
        if module is not layer and not f"{inner}.".startswith("base_layer."):
            _check_part(name, inner, module)


def _check_part(name: str, inner: str, part: nn.Module) -> None:
    """Raise if ``part``, inside the adapted layer ``name``, does more than hold a weight."""
    if _has_own_calls(part):
        raise TypeError(
            f"one_pass: layer {name!r}: its {inner} has hooks or a replaced forward, which one pass would skip; "
            "hooks on the layer itself run"
        )
    if "parametrizations" in part._modules and parametrize.is_parametrized(part):
        raise TypeError(
            f"one_pass: layer {name!r}: its {inner} is parametrized ({type(part).__name__}), which one pass would read "
            "only once; remove_parametrizations first"
        )
    if inner.startswith(("lora_A.", "lora_B.")) and original_class(part) not in (nn.Linear, nn.Conv2d):
        raise TypeError(f"one_pass: layer {name!r}: its {inner} is {type(part).__name__}, no plain LoRA")


def _has_own_calls(module: nn.Module) -> bool:
    """Tell whether a call of ``module`` does more than its class says."""
    held = vars(module)
    return "forward" in held or any(map(held.get, HOOKS))


def _read_peft_layer(layer, adapter: str) -> LoraWeights:
    scale, drops = float(layer.scaling[adapter]), layer.lora_dropout[adapter]
    dropout = getattr(drops, "p", 0.0)
    dora = layer.lora_magnitude_vector
    magnitude = dora[adapter].weight if adapter in dora else None
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return LoraWeights(a, b, scale, None, dropout, drops, magnitude=magnitude)
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return LoraWeights(a.weight, b.weight, scale, b.bias, dropout, drops, magnitude=magnitude)


def check_base_layer(name: str, base: nn.Module) -> None:
    """Raise if replacing ``base`` by its formula would lose something it does."""
    if _has_own_calls(base):
        raise TypeError(f"one_pass: layer {name!r} has hooks or a replaced forward, which one pass would skip")
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        raise TypeError(f"one_pass: layer {name!r} has max_norm, which rewrites its weight in every call")
    if isinstance(base, nn.Embedding) and getattr(base, "embed_scale", None) is not None:
        raise TypeError(f"one_pass: layer {name!r} has an embed_scale, by which PEFT multiplies its adapters")
    if isinstance(base, nn.Conv2d) and base.padding != "same" and _is_spread(base):
        raise TypeError(
            f"one_pass: layer {name!r} is a convolution with dilation {tuple(base.dilation)}: PEFT's adapter has none "
            "and gives maps of another size, so PEFT cannot add it either; only with padding='same' it can"
        )


def _is_spread(base: nn.Conv2d) -> bool:
    """Tell whether dilation makes a difference."""
    return any(size > 1 and dilation > 1 for size, dilation in zip(base.kernel_size, base.dilation, strict=True))
