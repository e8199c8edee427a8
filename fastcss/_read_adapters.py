"""Reads LoRA adapters, from the layers of a PEFT model or from PEFT folders, into one form and checks them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._files import read_tensors
from ._fused.base import original_class

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options of a LoraConfig that make an adapter more than x Aᵀ Bᵀ, or train something beside it.
NOT_PLAIN_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "layer_replication",
    "megatron_config",
)  # fmt: skip
REWRITES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """One adapter on one layer, as PEFT keeps it.

    Attributes:
        a: ``[r, K]`` (linear), ``[r, C, kh, kw]`` (convolution) or ``[r, V]`` (embedding).
        b: ``[N, r]``, for a convolution ``[N, r / groups, 1, 1]``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``[N]``, the bias of ``b``, where the adapter has one.
        dropout: probability of dropping an input of ``a`` in training.
    """

    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Adapters:
    """T named adapters of one model: for every adapted layer, each adapter's weights or None where it has none."""

    names: tuple[str, ...]
    layers: dict[str, list[LoraWeights | None]]

    @classmethod
    def empty(cls, names: Sequence[str]) -> Adapters:
        return cls(tuple(names), {})

    def add(self, layer: str, adapter: str, weights: LoraWeights) -> None:
        self.layers.setdefault(layer, [None] * len(self.names))[self.names.index(adapter)] = weights


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "conv2d" or "embedding" for a base layer that one pass can run, None for any other."""
    cls = original_class(module)
    if cls in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear) or is_conv1d(module):
        return "linear"
    return {nn.Conv2d: "conv2d", nn.Embedding: "embedding"}.get(cls)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that keeps its weight as [K, N]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# ------------------------------------------------------------------------------------------------ a PEFT model


def read_peft(model: nn.Module) -> tuple[nn.Module, Adapters]:
    """The base model inside ``model``, with its LoRA layers in place, and its adapters."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise ImportError(
            "one_pass: a PEFT model needs the package peft; one_pass.from_directories does not"
        ) from error

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs = getattr(model, "peft_config", {})
    for adapter, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise TypeError(f"one_pass: adapter {adapter!r} is {kind}; only LORA adapters run in one pass")
    tuned = {}
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise TypeError(
                f"one_pass: layer {name!r} is trained whole ({type(module).__name__}: modules_to_save or "
                "trainable tokens); only LoRA adapters run in one pass"
            )
        if isinstance(module, BaseTunerLayer):
            tuned[name] = module
    if not tuned:
        raise ValueError(f"one_pass: {type(model).__name__} has no LoRA layer; it wants a model with PEFT adapters")
    names = list(configs) or list(dict.fromkeys(key for layer in tuned.values() for key in _adapters_of(layer)))
    adapters = Adapters.empty(names)
    for name, layer in tuned.items():
        _check_peft_layer(name, layer)
        for adapter in _adapters_of(layer):
            adapters.add(name, adapter, _read_peft_layer(layer, adapter))
    return base, adapters


def _adapters_of(layer) -> list[str]:
    return [*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())]


def _check_peft_layer(name: str, layer) -> None:
    from peft.tuners import lora

    kinds = {lora.Linear: "linear", lora.Conv2d: "conv2d", lora.Embedding: "embedding"}
    base = layer.base_layer
    if kinds.get(type(layer)) is None or kinds[type(layer)] != kind_of(base):
        raise TypeError(
            f"one_pass: layer {name!r} is {type(layer).__module__}.{type(layer).__name__} over {type(base).__name__}; "
            "LoRA on Linear, Conv1D, Conv2d and Embedding runs in one pass"
        )
    check_base_layer(name, base)
    if layer.merged:
        raise ValueError(f"one_pass: layer {name!r} has merged adapters {layer.merged_adapters}; unmerge them first")
    variants = {adapter: type(variant).__name__ for adapter, variant in layer.lora_variant.items()}
    variants |= {adapter: "DoRA" for adapter, dora in layer.use_dora.items() if dora}
    for adapter, variant in variants.items():
        raise TypeError(f"one_pass: layer {name!r}, adapter {adapter!r}: {variant} is no plain LoRA")


def _read_peft_layer(layer, adapter: str) -> LoraWeights:
    scale, dropout = float(layer.scaling[adapter]), getattr(layer.lora_dropout[adapter], "p", 0.0)
    if adapter in layer.lora_embedding_A:
        return LoraWeights(layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], scale, None, dropout)
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return LoraWeights(a.weight, b.weight, scale, b.bias, dropout)


def check_base_layer(name: str, base: nn.Module) -> None:
    """Raise where replacing ``base`` by its formula would lose something it does."""
    if "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks:
        raise TypeError(f"one_pass: layer {name!r} has hooks or a replaced forward, which one pass would skip")
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        raise TypeError(f"one_pass: layer {name!r} has max_norm, which rewrites its weight in every call")
    if isinstance(base, nn.Conv2d) and tuple(base.dilation) != (1, 1):
        raise TypeError(f"one_pass: layer {name!r} is a dilated convolution, which PEFT's LoRA does not support")


# ------------------------------------------------------------------------------------------------ PEFT folders


def read_directories(model: nn.Module, directories: Sequence, names: Sequence[str] | None) -> Adapters:
    """The adapters of PEFT folders for ``model``, whose layers they must fit. Nothing is unpickled."""
    folders = [Path(directory) for directory in directories]
    if not folders:
        raise ValueError("one_pass.from_directories: wants at least one folder, got none")
    names = [folder.name for folder in folders] if names is None else list(names)
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"one_pass.from_directories: wants {len(folders)} different adapter names, got {names}")
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A"):
            raise ValueError(f"one_pass.from_directories: layer {name!r} has adapters already; it wants the bare model")
    modules = dict(model.named_modules())
    adapters = Adapters.empty(names)
    for folder, adapter in zip(folders, names, strict=True):
        config = _read_config(folder)
        tensors = read_tensors(folder / WEIGHTS_FILE, "one_pass.from_directories")
        for layer, parts in _by_layer(folder, tensors, modules).items():
            weights = _fit(f"{folder}: layer {layer!r}", modules[layer], parts, config, layer)
            adapters.add(layer, adapter, weights)
    return adapters


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"one_pass.from_directories: {path} is missing; a PEFT adapter folder holds it")
    try:
        config = json.loads(path.read_text())
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"one_pass.from_directories: {path} is no PEFT configuration: {error}") from error
    if kind != "LORA":
        raise TypeError(f"one_pass.from_directories: {folder} is a {kind} adapter; only LORA adapters run in one pass")
    for option in NOT_PLAIN_LORA:
        if config.get(option):
            raise TypeError(f"one_pass.from_directories: {folder} uses {option}; only plain LoRA runs in one pass")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REWRITES_THE_BASE):
        raise TypeError(
            f"one_pass.from_directories: {folder} was initialised by {init}, which changes the base weights"
        )
    if config.get("bias", "none") != "none":
        raise TypeError(f"one_pass.from_directories: {folder} trains the model's own biases (bias={config['bias']!r})")
    return config


_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+?)\.(?P<part>lora_(?:embedding_)?[AB](?:\.weight|\.bias)?|lora_.+|base_layer\..+)"
)


def _by_layer(folder: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Layer → {"a", "b", "bias"}, from keys such as ``base_model.model.encoder.query.lora_A.weight``."""
    parts = {
        "lora_A.weight": "a",
        "lora_B.weight": "b",
        "lora_B.bias": "bias",
        "lora_embedding_A": "a",
        "lora_embedding_B": "b",
    }
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise TypeError(f"one_pass.from_directories: {folder}: {key!r} is no LoRA weight (modules_to_save?)")
        layer, part = match["layer"], match["part"]
        if layer not in modules:
            raise ValueError(
                f"one_pass.from_directories: {folder}: the model has no layer {layer!r}; "
                "the adapter belongs to another base model"
            )
        if part in parts:
            layers.setdefault(layer, {})[parts[part]] = tensor
        elif part == "base_layer.weight" and torch.equal(tensor, modules[layer].weight.detach().to(tensor).cpu()):
            continue  # PEFT saves an adapted embedding with its adapter; here it is the model's own, unchanged
        else:
            raise TypeError(
                f"one_pass.from_directories: {folder}: layer {layer!r} holds {part!r}, which is no plain LoRA"
            )
    if not layers:
        raise ValueError(f"one_pass.from_directories: {folder} holds no adapter weights")
    return layers


def _fit(where: str, base: nn.Module, tensors: dict[str, Tensor], config: dict, layer: str) -> LoraWeights:
    kind = kind_of(base)
    if kind is None:
        raise TypeError(
            f"one_pass.from_directories: {where} is {type(base).__name__}; "
            "LoRA on Linear, Conv1D, Conv2d and Embedding runs in one pass"
        )
    check_base_layer(layer, base)
    if not {"a", "b"} <= tensors.keys():
        raise ValueError(f"one_pass.from_directories: {where} has only one half of its LoRA pair")
    a, b, bias = tensors["a"], tensors["b"], tensors.get("bias")
    rank = a.shape[0]
    wanted_a, wanted_b = _shapes(kind, base, rank)
    if tuple(a.shape) != wanted_a or tuple(b.shape) != wanted_b or (bias is not None and bias.shape != b.shape[:1]):
        raise ValueError(
            f"one_pass.from_directories: {where} wants A {list(wanted_a)} and B {list(wanted_b)} at rank {rank}, "
            f"the folder holds {list(a.shape)} and {list(b.shape)}; the adapter belongs to another base model"
        )
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    device = base.weight.device

    def place(tensor: Tensor | None) -> Tensor | None:
        # Half-precision adapters run in float32, as PEFT loads them.
        half = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor if tensor is None else tensor.to(device, torch.float32 if half else tensor.dtype)

    return LoraWeights(place(a), place(b), scale, place(bias), float(config.get("lora_dropout", 0.0)))


def _shapes(kind: str, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind == "embedding":
        return (rank, base.num_embeddings), (base.embedding_dim, rank)
    if kind == "conv2d":
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, 1, 1)
    width_out, width_in = base.weight.shape[::-1] if is_conv1d(base) else base.weight.shape
    return (rank, width_in), (width_out, rank)


def _of_pattern(patterns: dict | None, layer: str, default: float) -> float:
    """PEFT's rank_pattern/alpha_pattern rule: the first pattern that is the layer's name or the end of it."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)
