"""Captures CUDA graphs of a runner's calls, one for each set of input shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dispatch.private_apis import pytree
from .model_copy import ModelCopy
from .shared_work import SharedWork, version

WARM_UPS = 3  # library handles, workspaces and autotuning settle before the capture


class Graph:
    """Holds a CUDA graph of one call, and the stream that it is captured on."""

    def __init__(self) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, call: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, call: Callable[[], object]) -> object:
        with torch.cuda.graph(self._graph, stream=self._stream):
            return call()

    def replay(self) -> None:
        self._graph.replay()


@dataclasses.dataclass
class _Captured:
    call: Callable
    fixed: tuple[str, ...]
    graph: Graph
    inputs: list[Tensor]  # the graph reads these
    output: object  # the graph writes this
    constants: SharedWork  # results that were computed before the graph and that it reads
    stamp: tuple  # changes when the graph must be captured anew


class Captures:
    """Holds the graphs of one runner."""

    def __init__(self) -> None:
        self._graphs: dict[tuple, _Captured] = {}

    def add(
        self,
        tasks: tuple[int, ...],
        copy: ModelCopy,
        call: Callable,
        fixed: Sequence[str],
        args: tuple,
        kwargs: dict,
    ) -> None:
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for device in (copy.device, *(tensor.device for tensor in inputs)):
            if device.type != "cuda":
                raise RuntimeError(f"one_pass.capture: wants the model and its inputs on a CUDA device, got {device}")
        if copy.training:
            raise RuntimeError("one_pass.capture: wants the model in eval mode; a graph holds inference only")
        if copy.hooked is not None:
            where = copy.hooked or "the model"
            raise RuntimeError(f"one_pass.capture: {where} has hooks, which no replay of a graph would run")
        unknown = [name for name in fixed if name not in kwargs]
        if unknown:
            raise KeyError(f"one_pass.capture: fixed names {unknown[0]!r}, which is no keyword input of this call")
        fixed = tuple(fixed)
        captured = _capture(copy, call, fixed, args, kwargs)
        self._graphs[tasks, fixed, _key(fixed, args, kwargs)] = captured

    def find(self, tasks: tuple[int, ...], copy: ModelCopy, args: tuple, kwargs: dict) -> Callable | None:
        """Return the replay for these inputs, or None if no captured graph fits them."""
        if not self._graphs or copy.training or torch.is_grad_enabled():
            return None
        for fixed in dict.fromkeys(key[1] for key in self._graphs):
            key = tasks, fixed, _key(fixed, args, kwargs)
            captured = self._graphs.get(key)
            if captured is None:
                continue
            if captured.stamp != _stamp(copy, bool(fixed)):
                captured = self._graphs[key] = _capture(copy, captured.call, fixed, args, kwargs)
            return lambda captured=captured: _replay(captured, args, kwargs)
        return None


def _capture(copy: ModelCopy, call: Callable, fixed: tuple[str, ...], args: tuple, kwargs: dict) -> _Captured:
    inputs = _moving(fixed, args, kwargs)
    with torch.inference_mode(False):
        static = [tensor.clone() for tensor in inputs]
    args, kwargs = _with_moving(static, fixed, args, kwargs)
    # Results that depend on shapes (and on the fixed inputs) alone are computed in the warm-up and reused in the
    # capture. Copies from the host and reads of scalars, which no graph can hold, are among them.
    given = [kwargs[name] for name in fixed]
    constants = SharedWork([*given, *copy.tensors()] if fixed else [])
    graph = Graph()
    with torch.inference_mode(False), torch.no_grad(), constants:  # SharedWork has to see writes
        graph.warm_up(lambda: call(*args, **kwargs))
        try:
            output = graph.record(lambda: call(*args, **kwargs))
        except RuntimeError as error:
            raise RuntimeError(
                f"one_pass.capture: {type(copy.model).__name__} does what no CUDA graph can hold "
                f"(inputs that never change can be named in fixed=): {error}"
            ) from error
    return _Captured(call, fixed, graph, static, output, constants, _stamp(copy, bool(fixed)))


def _replay(captured: _Captured, args: tuple, kwargs: dict) -> object:
    for static, tensor in zip(captured.inputs, _moving(captured.fixed, args, kwargs), strict=True):
        static.copy_(tensor)
    captured.graph.replay()
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, captured.output)


def _moving(fixed: tuple[str, ...], args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the input tensors whose values a replay takes from its call."""
    kwargs = {name: value for name, value in kwargs.items() if name not in fixed}
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _with_moving(tensors: list[Tensor], fixed: tuple[str, ...], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return the call's arguments with ``tensors`` in place of its moving tensors; fixed inputs stay as they are."""
    left = iter(tensors)
    moving = {name: value for name, value in kwargs.items() if name not in fixed}
    args, moving = pytree.tree_map_only(Tensor, lambda _: next(left), (args, moving))
    return args, {name: moving.get(name, value) for name, value in kwargs.items()}


def _key(fixed: tuple[str, ...], args: tuple, kwargs: dict) -> tuple:
    """Return a key that is equal for calls that the same graph serves."""
    leaves, structure = pytree.tree_flatten(
        (args, {name: kwargs[name] for name in sorted(kwargs) if name not in fixed})
    )
    moving = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    same = tuple((id(kwargs[name]), version(kwargs[name])) for name in fixed if name in kwargs)
    modes = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cuda", "cpu"))
    return structure, moving, same, modes


def _stamp(copy: ModelCopy, with_weights: bool) -> tuple:
    """Return a stamp that changes when a graph must be captured anew.

    A graph reads weights and adapters at their addresses, so it sees new values there. Only results that were computed
    before it depend on old values of weights. Their counts of writes are compared, since comparing all values would
    stall the device.
    """
    tensors = copy.tensors() + copy.adapter_tensors()
    places = tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors)
    return copy, places, tuple(map(version, copy.tensors())) if with_weights else ()
