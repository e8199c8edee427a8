"""Lists a model's modules and parameters once, for the adapters of many folders."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .structural_copy import StructuralCopy


class NamedModel:
    """Stands for a bare model while folders are read for it, as long as its structure stays.

    ``wrapped`` are the modules that adapters of the model have for themselves, whole or some tokens of them.
    """

    def __init__(self, model: nn.Module, wrapped: Sequence[str] = ()) -> None:
        self._model, self.wrapped = model, wrapped
        self._listed: dict[tuple[str, bool], list] = {}
        self._by_name = dict(self.named_modules(remove_duplicate=False))

    @classmethod
    def of(cls, model: nn.Module | NamedModel) -> NamedModel:
        return model if isinstance(model, cls) else cls(model)  # type: ignore[arg-type]

    @classmethod
    def within(cls, model: nn.Module) -> NamedModel:
        """Return the bare model inside of ``model``, which has PEFT's layers: a copy of its structure without them."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        from .peft_layers import is_peft_layer

        copy, wrapped = StructuralCopy(model), []
        for name, layer in reversed([pair for pair in model.named_modules() if is_peft_layer(pair[1])]):
            if isinstance(layer, AuxiliaryTrainingWrapper):
                wrapped.append(name)
                copy.replace(layer, copy.of(layer.original_module))
            else:
                copy.replace(layer, copy.of(layer.get_base_layer()))
        return cls(copy.of(model), wrapped)

    def named_modules(self, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._list("named_modules", remove_duplicate))

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        return iter(self._list("named_parameters", remove_duplicate))

    def named_buffers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        return iter(self._list("named_buffers", remove_duplicate))

    def get_submodule(self, name: str) -> nn.Module:
        return self._by_name[name]

    @functools.cached_property
    def adapted_layer(self) -> str | None:
        """Return the name of a layer that has adapters already, or None."""
        held = ((name, vars(module)["_modules"]) for name, module in self.named_modules())
        return next((name for name, inside in held if "lora_A" in inside or "lora_embedding_A" in inside), None)

    @functools.cached_property
    def users(self) -> Counter[int]:
        """Count the names of each parameter, by its id."""
        return Counter(id(parameter) for _, parameter in self.named_parameters(remove_duplicate=False))

    def _list(self, what: str, remove_duplicate: bool) -> list:
        key = what, remove_duplicate
        if key not in self._listed:
            self._listed[key] = list(getattr(self._model, what)(remove_duplicate=remove_duplicate))
        return self._listed[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
