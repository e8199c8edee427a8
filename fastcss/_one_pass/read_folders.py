"""Reads LoRA adapters from the folders that PEFT saves, as PEFT reads them but without it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import read_tensors
from .fit_layers import fit
from .named_model import NamedModel
from .pissa_olora import CONVERT, why_not_repeatable
from .read_adapters import Adapters, kind_of
from .read_biases import check_not_nested, give_biases, taken_biases
from .read_by_peft import ByPeft
from .read_saved import CALLER, CONFIG_FILE, PREFIX, WEIGHTS_FILE, taken_saved
from .target_modules import targeted

# These options of a LoraConfig make an adapter more than x Aᵀ Bᵀ, or train something beside it.
NOT_PLAIN_LORA = (
    "use_qalora", "use_bdlora", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
    "layer_replication", "megatron_config",
)  # fmt: skip
# PEFT up to 0.21 writes these options, and those above.
KNOWN = frozenset((
    *NOT_PLAIN_LORA, "peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision",
    "peft_version", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "lora_bias", "ensure_weight_tying", "modules_to_save", "use_dora",
))  # fmt: skip

DROPPED = (
    "PEFT saves no layer that has another adapter's name in its own, such as '1' in 'layers.1'; rename it and save anew"
)


def read_directories(
    model: nn.Module | NamedModel, directories: Sequence, names: Sequence[str] | None, by_peft: str | None = None
) -> Adapters | ByPeft:
    """Read the adapters of PEFT folders for ``model``, whose layers they must fit. Nothing is unpickled.

    PEFT itself reads them if there is a reason, ``by_peft``, or if one of them is of a kind that has no form here.
    """
    folders = [Path(directory) for directory in directories]
    if not folders:
        raise ValueError(f"{CALLER}: wants at least one folder, got none")
    names = [folder.name for folder in folders] if names is None else list(names)
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"{CALLER}: wants {len(folders)} different adapter names, got {names}")
    model = NamedModel.of(model)
    if model.adapted_layer is not None:
        raise ValueError(f"{CALLER}: layer {model.adapted_layer!r} has adapters already; it wants the bare model")
    configs = [read_config(folder) for folder in folders]
    pairs = list(zip(folders, configs, strict=True))
    by_peft = by_peft or next(filter(None, (why_by_peft(*pair, model) for pair in pairs)), None)
    if by_peft:
        return ByPeft.read(folders, names, by_peft)
    modules = dict(model.named_modules())
    adapters = Adapters.empty(names)
    for folder, config, adapter in zip(folders, configs, names, strict=True):
        tensors = read_tensors(folder / WEIGHTS_FILE, CALLER)
        for module, own in taken_saved(str(folder), config, tensors, model).items():
            adapters.save(module, adapter, own)
        biases = taken_biases(str(folder), config, tensors, model)
        layers = by_layer(folder, tensors, model)
        check_targets(folder, config, model, layers)
        for layer, parts in layers.items():
            weights = fit(f"{folder}: layer {layer!r}", modules[layer], parts, config, layer)
            if weights.taken_out and model.users[id(modules[layer].weight)] > 1:
                init = config["init_lora_weights"]
                raise TypeError(
                    f"{CALLER}: {folder}: layer {layer!r} was initialised by {init}, which changes the weight that it "
                    f"shares with another layer; {CONVERT}"
                )
            adapters.add(layer, adapter, weights)
        give_biases(adapters, adapter, biases, model)
    check_not_nested(adapters)
    return adapters


# ----------------------------------------------------------------------------------------------- adapter_config.json


def read_config(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{CALLER}: {path} is missing; a PEFT adapter folder holds it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{CALLER}: {path} is no PEFT configuration: {error}") from error
    if kind is None:
        raise ValueError(f"{CALLER}: {path} is no PEFT configuration: it has no peft_type")
    if kind != "LORA":
        return config
    why = why_not_repeatable(config.get("init_lora_weights"))
    if why:
        raise TypeError(f"{CALLER}: {folder}: init_lora_weights={config['init_lora_weights']!r} {why}")
    unknown = {key: value for key, value in config.items() if key not in KNOWN and value}
    if unknown:
        _warn(f"{folder}: {CONFIG_FILE} has options that fastcss does not know and leaves out as PEFT would: {unknown}")
    return config


def why_by_peft(folder: Path, config: dict, model: nn.Module) -> str | None:
    """Return why PEFT itself has to read the folder, or None."""
    if config["peft_type"] != "LORA":
        return f"{folder} is a {config['peft_type']} adapter"
    option = next((option for option in NOT_PLAIN_LORA if config.get(option)), None)
    if option is not None:
        return f"{folder} uses {option}"
    layers = {name: model.get_submodule(name) for name in targeted(config, model) or ()}
    other = next((name for name, layer in layers.items() if kind_of(layer) is None), None)
    return other and f"{folder} has LoRA on {type(layers[other]).__name__} {other!r}"


def check_targets(folder: Path, config: dict, model: nn.Module, layers: dict) -> None:
    """Compare the layers that the folder has weights for with those that its own config names."""
    names = targeted(config, model)
    if names is None:
        return
    surplus = [layer for layer in layers if layer not in names]
    if config.get("ensure_weight_tying"):  # this option adds the layers that share a targeted embedding's weight
        surplus = [layer for layer in surplus if not _is_tied(layers[layer], layers)]
        untied = _untied(model, layers)
        if untied:
            raise ValueError(
                f"{CALLER}: {folder} holds no weights for {_some(untied)}, where ensure_weight_tying has PEFT adapt "
                "what shares the embedding's weight: PEFT ties and saves a model's first adapter only; load this one "
                "alone by PEFT and save it anew"
            )
    if surplus:
        raise ValueError(
            f"{CALLER}: {folder} holds weights for {_some(surplus)}, where its own {CONFIG_FILE} (target_modules, "
            "exclude_modules, layers_to_transform, ensure_weight_tying) wants none such: PEFT would leave them out; "
            "mend one of the files"
        )
    missing = [name for name in names if name not in layers]
    if not missing:
        return
    init = config.get("init_lora_weights", True)
    said = f"{folder} holds no weights for {_some(missing)}, which its own {CONFIG_FILE} targets"
    if init in (False, "orthogonal"):
        raise ValueError(f"{CALLER}: {said}; PEFT would draw them at random (init_lora_weights={init!r}). {DROPPED}")
    _warn(f"{said}; these layers run without the adapter, as PEFT runs them. {DROPPED}")


def _is_tied(parts: dict[str, Tensor], layers: dict[str, dict[str, Tensor]]) -> bool:
    """Tell whether A and B are, transposed, the B and A of another layer."""
    pairs = ((parts.get("a"), other.get("b"), parts.get("b"), other.get("a")) for other in layers.values())
    pairs = (pair for pair in pairs if all(x is not None and x.dim() == 2 for x in pair))
    return any(torch.equal(a, other_b.t()) and torch.equal(b, other_a.t()) for a, other_b, b, other_a in pairs)


def _untied(model: nn.Module, layers: dict[str, dict[str, Tensor]]) -> list[str]:
    """Return the layers without adapter weights that share their weight with an adapted embedding that PEFT ties."""
    weights = {name: module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    embeddings = [layer for layer in layers if layer.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    shared = {id(weights[layer]) for layer in embeddings if layer in weights}
    return [name for name, weight in weights.items() if id(weight) in shared and name not in layers]


def _some(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 3} more layers" if len(layers) > 3 else ""
    return ", ".join(repr(layer) for layer in layers[:3]) + more


def _warn(message: str) -> None:
    warnings.warn(f"{CALLER}: {message}", stacklevel=5)  # names the line that calls from_directories


# ----------------------------------------------------------------------------------------- adapter_model.safetensors

# Keys that were saved without PEFT's help contain the adapter's own name, as in its state_dict.
_PAIR = re.compile(r"(?P<layer>.+?)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)")
_MAGNITUDE = re.compile(r"(?P<layer>.+?)\.lora_(?P<part>magnitude)_vector(?:\.(?P<adapter>[^.]+))??(?:\.weight)?")
_EMBEDDING = re.compile(r"(?P<layer>.+?)\.lora_embedding_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?")
WRAPPERS = {"_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP", "module.": "DistributedDataParallel"}


def by_layer(folder: Path, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Group tensors by layer → {"a", "b", …}; keys look like ``base_model.model.encoder.query.lora_A.weight``."""
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, Tensor]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _PAIR.fullmatch(name) or _EMBEDDING.fullmatch(name) or _MAGNITUDE.fullmatch(name)
        if match is None:
            _check_not_lora(folder, key, name, tensor, model)
            continue
        layer, part = match["layer"], match["part"].lower()
        if match.groupdict().get("kind") == "bias":
            part = "bias" if part == "b" else "bias of A"
        if layer not in modules:
            raise ValueError(f"{CALLER}: {folder}: {_why_not_there(layer, model)}")
        if part == "bias of A" or part in layers.setdefault(layer, {}):
            raise ValueError(f"{CALLER}: {folder}: {key!r} has no place in a LoRA adapter, or is there a second time")
        layers[layer][part] = tensor
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise ValueError(
            f"{CALLER}: {folder} holds several adapters, {sorted(map(str, adapters))} by their keys; save each in a "
            "folder of its own"
        )
    if not layers:
        raise ValueError(f"{CALLER}: {folder} holds no adapter weights. {DROPPED}")
    return layers


def _check_not_lora(folder: Path, key: str, name: str, tensor: Tensor, model: nn.Module) -> None:
    """Raise unless ``tensor`` equals the model's own: PEFT saves embeddings, and loads them into the model."""
    layer, _, part = name.partition(".lora_")
    if part.startswith(("down.", "up.")) or name.endswith(".alpha"):
        raise TypeError(
            f"{CALLER}: {folder}: {key!r} is a key of kohya's scripts (lora_down, lora_up, alpha); convert the file to "
            "PEFT's format (lora_A, lora_B)"
        )
    if part:
        raise TypeError(f"{CALLER}: {folder}: layer {layer!r} holds 'lora_{part}', which is no plain LoRA")
    own = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    mine = own.get(name.replace(".base_layer.", "."))
    if mine is None:
        raise TypeError(f"{CALLER}: {folder}: {key!r} is no LoRA weight, and of no module in its modules_to_save")
    if mine.shape != tensor.shape or not torch.equal(tensor.to(mine), mine.detach()):
        raise TypeError(
            f"{CALLER}: {folder}: {key!r} {list(tensor.shape)} differs from the model's own {list(mine.shape)}, which "
            "PEFT would overwrite for every adapter (bias=, a trained or resized embedding); load it into the model"
        )


def _why_not_there(layer: str, model: nn.Module) -> str:
    alias = dict(model.named_modules(remove_duplicate=False)).get(layer)
    modules = dict(model.named_modules())
    if alias is not None:
        first = next(name for name, module in modules.items() if module is alias)
        return f"layer {layer!r} is the model's {first!r} by another name; PEFT adapts a module by its first name only"
    for wrapper, tool in WRAPPERS.items():
        if layer.replace(wrapper, "") in modules:
            return f"the key of layer {layer!r} has {wrapper!r} of {tool} in it; save the unwrapped model's adapter"
    return (
        f"the model has no layer {layer!r}; the adapter belongs to another base model, or to this one in a release of "
        "transformers that names its layers otherwise"
    )
