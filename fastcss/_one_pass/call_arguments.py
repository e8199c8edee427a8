"""Checks the arguments of a runner and of its call that are not the model's own inputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def check_adapters(adapters: Sequence[str] | None, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the places of ``adapters`` in ``names``, of all where none are named."""
    if adapters is None:
        return tuple(range(len(names)))
    adapters = adapters if isinstance(adapters, str) else list(adapters)
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"one_pass: adapters must be a list of adapter names, got {adapters!r}")
    unknown = [name for name in adapters if name not in names]
    if unknown:
        raise KeyError(f"one_pass: no adapter {unknown[0]!r}; there are {', '.join(names)}")
    return tuple(map(names.index, adapters))


def check_per_adapter(per_adapter: Mapping[str, Tensor], kwargs: dict, tasks: int) -> dict[str, Tensor]:
    for name, tensor in per_adapter.items():
        if name in kwargs:
            raise ValueError(f"one_pass: {name!r} is given twice, for all adapters and in per_adapter")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"one_pass: per_adapter[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if tensor.shape[:1] != (tasks,):
            raise ValueError(f"one_pass: per_adapter[{name!r}] must be [{tasks}, …], got {list(tensor.shape)}")
    return dict(per_adapter)


def check_group_size(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise ValueError(f"one_pass: group_size must be at least 1, got {size}")
    return size


def check_task_dim(dim: int) -> int:
    if dim not in (0, 1):
        raise ValueError(f"one_pass: task_dim must be 0 or 1, got {dim!r}")
    return dim


def check_route(
    route: Tensor | Sequence[str | None],
    adapters: object,
    per_adapter: object,
    names: tuple[str, ...],
    device: torch.device,
) -> Tensor:
    """Return the place in ``names`` of each sample's adapter, -1 for none."""
    if adapters is not None:
        raise ValueError("one_pass: adapters and route exclude each other")
    if per_adapter:
        raise ValueError("one_pass: per_adapter and route exclude each other")
    if isinstance(route, (list, tuple)):
        return torch.tensor(places(route, {name: t for t, name in enumerate(names)}, "one_pass"), device=device)
    if not isinstance(route, Tensor) or route.dtype not in (torch.int32, torch.int64) or route.dim() != 1:
        got = f"{route.dtype} {list(route.shape)}" if isinstance(route, Tensor) else type(route).__name__
        raise TypeError(f"one_pass: route must be a list of names, or an int32 or int64 tensor [B], got {got}")
    if route.device.type == "cpu" and len(route) and not -1 <= route.min() <= route.max() < len(names):
        raise IndexError(f"one_pass: route must hold places of {len(names)} adapters, or -1, got {route.tolist()}")
    return route


def places(route: Sequence[str | None], known: Mapping[str, int], caller: str) -> list[int]:
    """Return the place of each name in ``route``, -1 for None."""
    found = [-1 if name is None else known.get(name, len(known)) if isinstance(name, str) else None for name in route]
    for entry, (name, place) in enumerate(zip(route, found, strict=True)):
        if place is None:
            raise TypeError(f"{caller}: route must hold adapters' names, or None, got {name!r} for sample {entry}")
        if place == len(known):
            raise KeyError(f"{caller}: no adapter {name!r}; {_near(name, known)}")
    return found


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 3) or list(known)[:3]
    return f"there are {', '.join(near)}{', …' if len(list(known)) > len(near) else ''}"
