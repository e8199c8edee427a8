"""Remembers the calls of a model that do not depend on the adapters, so that a second run takes their results."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._task_rules import is_mapped

_RANDOM = {"bernoulli", "dropout", "multinomial", "normal", "poisson", "alpha_dropout", "feature_dropout"}
_PLAIN = (
    int,
    float,
    complex,
    str,
    slice,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class SharedWork(TorchFunctionMode):
    """While active, a call whose tensors are all *shared* is run once and then answered from memory.

    Shared are the tensors given at the start (weights, inputs) and the results of calls on shared tensors only. An
    adapted layer's result is not, nor what follows from it, and those calls run every time. A tensor that has been
    written in place, itself or through a view, is shared no longer: each run computes it anew and writes it again.
    Random numbers are drawn in each run.

    Not for ``torch.inference_mode``, whose tensors do not count their writes.
    """

    def __init__(self, shared: Iterable[Tensor]) -> None:
        super().__init__()
        # id → the tensor, which it holds so that the id stays its own, and its version when it became shared.
        self._shared: dict[int, tuple[Tensor, int]] = {}
        self._results: dict[tuple, object] = {}
        self._share(shared)

    def is_shared(self, tensor: Tensor) -> bool:
        entry = self._shared.get(id(tensor))
        return entry is not None and not is_mapped(tensor) and entry[1] == version(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = self._key(func, leaves, structure)
        if key is None:
            return func(*args, **kwargs)
        if key in self._results and all(map(self.is_shared, _tensors(pytree.tree_leaves(self._results[key])))):
            return self._results[key]
        result = func(*args, **kwargs)
        returned = pytree.tree_leaves(result)
        writes = not all(map(self.is_shared, _tensors(leaves)))
        if not writes and all(isinstance(leaf, (Tensor, int, float)) for leaf in returned):
            self._results[key] = result
            self._share(_tensors(returned))
        return result

    def _share(self, tensors: Iterable[Tensor]) -> None:
        self._shared.update((id(t), (t, version(t))) for t in tensors)

    def _key(self, func, leaves: list, structure) -> tuple | None:
        """What makes a later call the same call; None for a call that must not be remembered."""
        name = getattr(func, "__name__", "")
        if name.startswith("rand") or name in _RANDOM:
            return None
        parts = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if not self.is_shared(leaf):
                    return None
                parts.append(id(leaf))
            elif isinstance(leaf, _PLAIN):
                parts.append((type(leaf), repr(leaf)))
            else:
                return None
        autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        return func, structure, tuple(parts), torch.is_grad_enabled(), *autocast


def _tensors(leaves: list) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def version(tensor: Tensor) -> int:
    """Counts the writes of ``tensor``; nothing counts those of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version
