"""Reads folders of adapters that have no form here, by PEFT itself, around a twin of the user's bare model.

The twin has tensors of its own while PEFT works on it, since PEFT freezes what it finds and may rewrite it. Then it has
those of the user's model.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import read_tensors
from .peft_layers import is_peft_layer, tensors_of
from .read_adapters import Adapters, read_peft
from .read_saved import CALLER, WEIGHTS_FILE
from .shared_work import memory
from .structural_copy import StructuralCopy


@dataclasses.dataclass(frozen=True)
class ByPeft:
    """Holds what PEFT reads of T folders: their configurations and tensors, to be built anew when the model changes.

    Attributes:
        names: the adapters' names.
        folders: where they come from, for messages.
        configs: PEFT's configurations.
        tensors: the tensors of each folder.
    """

    names: tuple[str, ...]
    folders: tuple[str, ...]
    configs: tuple[object, ...]
    tensors: tuple[dict[str, Tensor], ...]

    @classmethod
    def read(cls, folders: Sequence[Path], names: Sequence[str], why: str) -> ByPeft:
        try:
            from peft import PeftConfig
        except ImportError as error:
            raise ImportError(f"{CALLER}: {why}, which only PEFT reads, and the package peft is missing") from error

        configs = tuple(PeftConfig.from_pretrained(str(folder)) for folder in folders)
        tensors = tuple(read_tensors(folder / WEIGHTS_FILE, CALLER) for folder in folders)
        return cls(tuple(names), tuple(map(str, folders)), configs, tensors)

    def of(self, names: Sequence[str]) -> ByPeft:
        """Return the adapters ``names``, in this order."""
        places = list(map(self.names.index, names))
        return ByPeft(*(tuple(getattr(self, f.name)[p] for p in places) for f in dataclasses.fields(self)))

    def and_then(self, other: ByPeft) -> ByPeft:
        """Return these adapters, then ``other``'s."""
        return ByPeft(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def built_on(self, model: nn.Module) -> tuple[nn.Module, Adapters, list[tuple[nn.Module, nn.Module]]]:
        """Return a twin of ``model`` with the adapters in it, as ``read_peft`` does, and the pairs of their modules.

        Raises:
            TypeError, ValueError: PEFT does not load a folder, leaves a part of it out, or changes the base model.
        """
        from peft import PeftMixedModel, PeftModel

        structure = StructuralCopy(model)
        twin, around = structure.of(model), None
        in_folders: set[int] = set()
        theirs = _give_own_tensors(twin)
        kind = PeftModel if len({config.peft_type for config in self.configs}) == 1 else PeftMixedModel
        for name, folder, config, tensors in zip(self.names, self.folders, self.configs, self.tensors, strict=True):
            config = copy.deepcopy(config)
            config.inference_mode = True
            try:
                with warnings.catch_warnings(), torch.random.fork_rng():
                    warnings.simplefilter("ignore")  # of a second adapter, and of what it says for training
                    if around is None:
                        around = kind(twin, config, name)
                    else:
                        around.add_adapter(name, config)
                    in_folders |= _load(around, name, tensors, folder)
            except _LeftOutError as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                kind_of_adapter = getattr(config.peft_type, "value", config.peft_type)
                raise TypeError(
                    f"{CALLER}: {folder} is a {kind_of_adapter} adapter, which PEFT does not load here: {error}"
                ) from error
        _give_back(around, theirs)
        base, adapters = read_peft(around)
        adapters = dataclasses.replace(adapters, made_of=_made_of(base, adapters.names, in_folders))
        return base, adapters, [(model, twin), *structure.pairs]


class _LeftOutError(ValueError):
    """Says that PEFT has not taken over a part of a folder."""


def _load(around: nn.Module, name: str, tensors: dict[str, Tensor], folder: str) -> set[int]:
    """Load a folder's tensors; return the places in memory where they then are."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(around, dict(tensors), adapter_name=name)
    loaded = get_peft_model_state_dict(around, adapter_name=name)
    for key in dict.fromkeys((*tensors, *loaded)):
        where = f"{CALLER}: {folder}: {key!r}"
        if key not in tensors:
            raise _LeftOutError(f"{where} is not in the folder, and PEFT would draw it at random")
        if key not in loaded or loaded[key].shape != tensors[key].shape:
            raise _LeftOutError(f"{where} has no place in the model, and PEFT would leave it out")
        if not torch.equal(tensors[key].to(loaded[key]), loaded[key]):
            raise _LeftOutError(f"{where} has other values when PEFT has loaded it")
    return {tensor.data_ptr() for tensor in loaded.values()}


def _made_of(base: nn.Module, names: Sequence[str], in_folders: set[int]) -> tuple[Tensor, ...]:
    """Return the weights of layers in which adapters have tensors that no folder holds: PEFT may make them of these."""
    found: list[Tensor] = []
    for layer in base.modules():
        if is_peft_layer(layer) and hasattr(layer, "get_base_layer"):
            own = [tensor for name in names for tensor in tensors_of(layer, name) if tensor.numel()]
            if any(tensor.data_ptr() not in in_folders for tensor in own):
                found += layer.get_base_layer().parameters()
    return tuple({id(tensor): tensor for tensor in found}.values())


def _give_own_tensors(twin: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
    """Give ``twin`` copies of its tensors; return, by the copies' memory, the copies and what they were made of."""
    made: dict[int, Tensor] = {}
    given: dict[int, tuple[Tensor, Tensor]] = {}
    for name, module in twin.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter):
                    raise TypeError(
                        f"{CALLER}: {type(module).__name__} {name!r} has a {key} of class {type(tensor).__name__}, as "
                        "quantised layers have, which no copy of its values stands for; load the adapters by PEFT, and "
                        "give one_pass that"
                    )
                if id(tensor) not in made:
                    own = tensor.detach().clone()
                    own = nn.Parameter(own, tensor.requires_grad) if held is module._parameters else own
                    made[id(tensor)] = own
                    given[memory(own)] = own, tensor
                held[key] = made[id(tensor)]
    return given


def _give_back(around: nn.Module, theirs: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put the user's tensors where PEFT has left their copies as they were; refuse other copies.

    A copy is known by its memory: PEFT's layer on attention makes new parameters of it each time that it is looked at.
    """
    found = set()
    for module in around.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                place = None if tensor is None else memory(tensor)
                if place not in theirs or tensor.shape != theirs[place][0].shape:
                    continue
                own, tensor = theirs[place]
                if not torch.equal(own, tensor):
                    raise TypeError(
                        f"{CALLER}: PEFT changes the base model's {key!r} {list(tensor.shape)} when it loads these "
                        "adapters, and the runner leaves the model as it is; load them by PEFT, and give one_pass that"
                    )
                held[key] = tensor
                found.add(place)
    if found != set(theirs):
        raise TypeError(
            f"{CALLER}: PEFT replaces weights of the base model when it loads these adapters, so that the runner could "
            "not follow the model; load them by PEFT, and give one_pass that"
        )
