"""CUDA tensors and graphs for a machine without CUDA.

A ``PretendCuda`` says that it is on a CUDA device, so that code which asks takes the way that it takes on a GPU, and
keeps its values on the CPU, where every call on it is computed. A ``PretendGraph`` repeats such calls and nothing else:
what the host did between them while it was recorded is not done again, as with a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from private_apis import CUDA, META, device_guards
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)

_GUARDS = device_guards()
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_READING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class PretendCuda(Tensor):
    """A tensor on the pretended device; ``values`` is the same on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendCuda:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, values.shape, **layout, dtype=values.dtype, device=DEVICE)
        made.values = values
        return made

    def tolist(self) -> list:
        return [row.tolist() if row.dim() else row.item() for row in self]  # torch's own refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the pretended device outside of it")


class PretendDevice(TorchDispatchMode):
    """The pretended device, there while it is entered.

    Attributes:
        calls: of the last recording: (function, args, kwargs, result), the tensors of which are on the CPU.
        faults: those of them that no CUDA graph can hold: values that the host reads, and tensors that are made on it
            or copied to or from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # under which torch does not start the real device
        self._recording = False
        self.calls: list[tuple] = []
        self.faults: list[str] = []

    def __enter__(self):
        self._only_lift, self._guard = torch._C._only_lift_cpu_tensors(), _GUARDS[CUDA]
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor's copy to the device is a call of its own
        _GUARDS[CUDA] = _GUARDS[META]
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._only_lift)
        _GUARDS[CUDA] = self._guard
        return super().__exit__(*error)

    @contextlib.contextmanager
    def record(self) -> Iterator[list[tuple]]:
        """The calls while this is open; who asks is told that a graph is being captured."""
        asked, torch.cuda.is_current_stream_capturing = torch.cuda.is_current_stream_capturing, lambda: True
        self.calls, self.faults, self._recording = [], [], True
        try:
            yield self.calls
        finally:
            self._recording, torch.cuda.is_current_stream_capturing = False, asked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [isinstance(t, PretendCuda) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = kwargs.get("device")
        on_device = any(given) if device is None else torch.device(device).type == DEVICE.type
        host = kwargs if device is None else {**kwargs, "device": torch.device("cpu")}
        host_args, host_kwargs = pytree.tree_map_only(PretendCuda, lambda tensor: tensor.values, (args, host))
        result = func(*host_args, **host_kwargs)
        if self._recording:
            self.calls.append((func, host_args, host_kwargs, result))
            makes = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
            if _reads(func, args) or not all(given) or (makes and not on_device):
                self.faults.append(str(func))
        if not on_device:
            return result
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map_only(Tensor, PretendCuda, result))


def _reads(func, args: tuple) -> bool:
    """The host has to know values: to go on, or for the shape of the result, as of one indexed with a mask."""
    if func.overloadpacket in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return any(tag in func.tags for tag in _READING)


class PretendGraph:
    """Stands for ``cuda_graphs.Graph``: a replay repeats the device's calls, on the memory that they had."""

    def __init__(self, device: PretendDevice) -> None:
        self._device = device

    def warm_up(self, call: Callable[[], object]) -> None:
        call()  # once: no libraries have to settle here

    def record(self, call: Callable[[], object]) -> object:
        with self._device.record() as self._calls:
            return call()

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            if "empty" in func.__name__:
                continue
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # else it is written, or a view of what is
                    old.copy_(new)


def _tensors(nested: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def to_device(value):
    """``value`` on the pretended device: a module in place, else a copy of any nesting of tensors."""
    if not isinstance(value, nn.Module):
        return pytree.tree_map_only(Tensor, PretendCuda, value)
    moved = {id(t): PretendCuda(t.detach()) for t in (*value.parameters(), *value.buffers())}
    for parameter in value.parameters():
        moved[id(parameter)] = nn.Parameter(moved[id(parameter)], parameter.requires_grad)
    for module in value.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: moved[id(t)] for name, t in tensors.items() if t is not None})
    return value
