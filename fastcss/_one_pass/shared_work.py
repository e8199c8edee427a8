"""Remembers the calls of a model that do not depend on the adapters, so that later runs reuse their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._dispatch.private_apis import any_autocast_is_enabled, pytree
from .draw_detection import draws
from .task_rules import is_mapped

_PLAIN = (
    int,
    float,
    complex,
    str,
    slice,
    type(None),
    type(...),
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.qscheme,
)
# These calls give access to memory that may then be written without raising the tensor's version.
_UNCOUNTED = {Tensor.data.__get__, Tensor.data.__set__, Tensor.data_ptr}
_DEVICES = ("cpu", "cuda", "xpu", "mps")


class SharedWork(TorchFunctionMode):
    """Runs a call whose tensors are all *shared* once while active, and then answers it from memory.

    The tensors given at the start (weights, inputs) are shared, and so are the results of calls on shared tensors only.
    An adapted layer's result is not shared, nor is anything computed from it; those calls run every time. A tensor that
    was written in place, itself or through a view, is no longer shared: each run computes it anew and writes it again.
    The same holds for a tensor whose memory the model asked for (``data``, ``numpy()``, ``data_ptr()``), since it may
    then be written unseen. Random numbers are drawn in each run. Lists and other containers are handed out as copies.

    It does not work in ``torch.inference_mode``, whose tensors do not count their writes: calls in it run every time.
    """

    def __init__(self, shared: Iterable[Tensor]) -> None:
        super().__init__()
        # id → the tensor, held so that no other object gets its id, and its version when it became shared.
        self._shared: dict[int, tuple[Tensor, int]] = {}
        self._results: dict[tuple, tuple[list, pytree.TreeSpec]] = {}
        self._share(shared)

    def is_shared(self, tensor: Tensor) -> bool:
        entry = self._shared.get(id(tensor))
        return entry is not None and not is_mapped(tensor) and entry[1] == version(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__iter__:  # its iterator would make calls that no mode sees
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = self._key(func, leaves, structure)
        if key in self._results:
            known, form = self._results[key]
            if all(map(self.is_shared, _tensors(known))):
                return pytree.tree_unflatten(known, form)
        if key is None:
            result, again = func(*args, **kwargs), False
            if isinstance(result, Tensor) and func not in _UNCOUNTED:  # the quick way out, for nearly all such calls
                return result
        else:
            result, drew = draws(func, args, kwargs, leaves, structure)
            again = not drew
        returned, form = pytree.tree_flatten(result)
        if func in _UNCOUNTED or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in returned):
            self._unshare(_tensors(leaves))
        # A call that returns nothing is made for its effect: no_grad, say, which torch shows to its modes as a call.
        again = again and bool(returned) and all(isinstance(leaf, (Tensor, int, float)) for leaf in returned)
        again = again and all(map(self.is_shared, _tensors(leaves)))  # otherwise the call has written them
        if again and not any(map(Tensor.is_inference, _tensors(returned))):
            self._results[key] = returned, form
            self._share(_tensors(returned))
        return result

    def _share(self, tensors: Iterable[Tensor]) -> None:
        self._shared.update((id(t), (t, version(t))) for t in tensors)

    def _unshare(self, tensors: Iterable[Tensor]) -> None:
        """Forget these tensors and all others in the same memory."""
        written = {memory(tensor) for tensor in tensors if id(tensor) in self._shared}
        if written:
            self._shared = {key: entry for key, entry in self._shared.items() if memory(entry[0]) not in written}

    def _key(self, func: Callable, leaves: list, structure: pytree.TreeSpec) -> tuple | None:
        """Return a key that is equal for equal calls, or None for a call that must not be remembered."""
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
        return func, structure, tuple(parts), _surroundings()


def _surroundings() -> tuple:
    """Return the global settings that decide, beside its arguments, what a call returns."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        any_autocast_is_enabled()
        and tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in _DEVICES),
    )


def memory(tensor: Tensor) -> int:
    """Return a number that is equal for tensors in the same memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one without memory
        return id(tensor)


def _tensors(leaves: list) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def version(tensor: Tensor) -> int:
    """Return the number of writes to ``tensor``; 0 for inference tensors, whose writes torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
