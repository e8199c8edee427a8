"""Builds the copy of a model that runs in its place: what stands in it for adapted layers and for what tasks own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from .adapted_kinds import adapted
from .adapted_layer import Adapted, Slots
from .hooks import take_hooks
from .peft_in_turn import run_in_turn
from .read_adapters import Adapters
from .saved_modules import SavedModules, with_tensors
from .structural_copy import StructuralCopy

Pair = tuple[nn.Module, nn.Module]


@dataclasses.dataclass
class BuiltCopy:
    """Holds a model's copy, and its parts beside those of the model that they stand for.

    Attributes:
        model: the copy.
        structure: gives the copy's module for one of the model's.
        layers: by name the adapted layers, as PEFT made them or bare, with the layers that run all their adapters.
        saved: by name the modules that adapters were saved with whole, with what runs each task's own.
        in_turn: by name PEFT's layers that have no form here, with their copies, which run a task at a time.
        of_folders: modules with the copies of them that adapters read from folders own.
    """

    model: nn.Module
    structure: StructuralCopy
    layers: dict[str, tuple[nn.Module, Adapted]] = dataclasses.field(default_factory=dict)
    saved: dict[str, tuple[nn.Module, SavedModules]] = dataclasses.field(default_factory=dict)
    in_turn: dict[str, Pair] = dataclasses.field(default_factory=dict)
    of_folders: list[Pair] = dataclasses.field(default_factory=list)


def build_copy(model: nn.Module, adapters: Adapters, slots: Slots) -> BuiltCopy:
    """Copy ``model`` with all adapters in each adapted layer.

    What stands for PEFT's layers and wrappers is known before the copy is made, so that whatever refers to these refers
    to it. A bare layer or module gets its place afterwards: under the name that an adapter gives it, not under others.
    """
    structure = StructuralCopy(model)
    layers = {name: model.get_submodule(name) for name in adapters.layers}
    saved = {name: (model.get_submodule(name), SavedModules(adapters.names, slots)) for name in adapters.saved}
    of_peft: dict[str, Adapted] = {}
    for name, layer in layers.items():
        if hasattr(layer, "base_layer"):
            of_peft[name] = adapted(structure.of(layer.base_layer), adapters.layers[name], slots)
            structure.replace(layer, of_peft[name])
    for wrapper, ours in saved.values():
        if hasattr(wrapper, "modules_to_save"):
            structure.replace(wrapper, ours)
    built = BuiltCopy(structure.of(model), structure, saved=saved)
    for name, layer in layers.items():
        if name in of_peft:
            take_hooks(layer, of_peft[name], structure)
            built.layers[name] = layer, of_peft[name]
        else:
            ours = adapted(structure.of(layer), adapters.layers[name], slots)
            _put(built.model, name, ours)
            built.layers[name] = layer, ours
    for name in saved:
        _fill(built, name, adapters)
    built.in_turn = _run_in_turn(model, structure, adapters.names, slots)
    return built


def _fill(built: BuiltCopy, name: str, adapters: Adapters) -> None:
    """Give a module that adapters were saved with whole the model's own, and each adapter's."""
    module, ours = built.saved[name]
    structure = built.structure
    if hasattr(module, "modules_to_save"):
        held = module.modules_to_save
        own = [structure.of(held[adapter]) if adapter in held else None for adapter in adapters.names]
        ours.fill(structure.of(module.original_module), own)
        take_hooks(module, ours, structure)
        return
    made = [None if tensors is None else with_tensors(module, tensors) for tensors in adapters.saved[name]]
    built.of_folders += [pair for one in made if one for pair in one[1]]
    ours.fill(structure.of(module), [one and one[0] for one in made])
    _put(built.model, name, ours)


def _put(model: nn.Module, name: str, ours: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = ours


def _run_in_turn(model: nn.Module, structure: StructuralCopy, names: Sequence[str], slots: Slots) -> dict[str, Pair]:
    """Let those layers of PEFT that have no form here run in turn; return them by name, with their copies."""
    of_peft = {name: module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    pairs = {name: (module, structure.of(module)) for name, module in of_peft.items()}
    pairs = {name: pair for name, pair in pairs.items() if not isinstance(pair[1], (Adapted, SavedModules))}
    for _, ours in pairs.values():
        run_in_turn(ours, names, slots)
    return pairs
