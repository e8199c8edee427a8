"""Reads the modules that PEFT saves whole with an adapter (``modules_to_save``) from the tensors of its folder."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from .target_modules import saved_whole

CALLER = "one_pass.from_directories"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def taken_saved(folder: str, config: dict, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, dict]:
    """Take the modules saved whole out of ``tensors``; return the tensors of each by their names in its state_dict."""
    names = saved_whole(config, model)
    if not names:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    copies = Counter(id(module) for module in modules.values())
    for name in names:
        inside = next((other for other in names if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise TypeError(f"{CALLER}: {folder}: modules_to_save names {inside!r} and {name!r}, which lies in it")
        if copies[id(modules[name])] > 1:
            raise TypeError(f"{CALLER}: {folder}: modules_to_save names {name!r}, which the model has by several names")
        if config.get("ensure_weight_tying") and _is_tied(modules[name], model):
            raise TypeError(f"{CALLER}: {folder}: ensure_weight_tying ties {name!r}, which is saved whole; save untied")
    return {name: _tensors_of(f"{folder}: module {name!r}", name, modules[name], tensors) for name in names}


def _is_tied(module: nn.Module, model: nn.Module) -> bool:
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    inside = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return any(users[key] > count for key, count in inside.items())


def _tensors_of(where: str, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of the module ``name`` out of ``tensors``."""
    wanted, found = module.state_dict(), {}
    for key in list(tensors):
        inner = key.removeprefix(PREFIX).removeprefix(f"{name}.")
        if key.removeprefix(PREFIX) == inner:
            continue
        if inner not in wanted:
            raise ValueError(f"{CALLER}: {where} is saved whole, and has no {inner!r}, which the folder holds")
        found[inner] = tensors.pop(key)
    missing = [key for key in wanted if key not in found]
    if missing:
        raise ValueError(
            f"{CALLER}: {where} is saved whole (modules_to_save), and the folder does not hold its {missing[0]!r}"
        )
    return {key: _fitting(where, key, found[key], wanted[key]) for key in wanted}


def _fitting(where: str, key: str, own: Tensor, wanted: Tensor) -> Tensor:
    if own.shape != wanted.shape:
        raise ValueError(
            f"{CALLER}: {where}: {key!r} is {list(own.shape)} in the folder and {list(wanted.shape)} in the model; the "
            "adapter belongs to another base model"
        )
    return own.to(wanted.device)


def fits_still(name: str, adapter: str, own: dict[str, Tensor], module: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors of a module that was read from a folder, on the device of ``module`` as it is now."""
    wanted = {} if module is None else module.state_dict()
    whole = own.keys() == wanted.keys() or own.keys() == {"bias"} & wanted.keys()
    if not whole or any(own[key].shape != wanted[key].shape for key in own):
        raise ValueError(f"one_pass: module {name!r} is another now, which {adapter!r} was not saved with")
    return {key: tensor.to(wanted[key].device) for key, tensor in own.items()}
