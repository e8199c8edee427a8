"""Checks the arguments of a runner's call that are not the model's own inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_per_adapter(per_adapter: Mapping[str, Tensor], kwargs: dict, tasks: int) -> dict[str, Tensor]:
    for name, tensor in per_adapter.items():
        if name in kwargs:
            raise ValueError(f"one_pass: {name!r} is given twice, for all adapters and in per_adapter")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"one_pass: per_adapter[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if tensor.shape[:1] != (tasks,):
            raise ValueError(f"one_pass: per_adapter[{name!r}] must be [{tasks}, …], got {list(tensor.shape)}")
    return dict(per_adapter)


def check_task_dim(dim: int) -> int:
    if dim not in (0, 1):
        raise ValueError(f"one_pass: task_dim must be 0 or 1, got {dim!r}")
    return dim


def check_route(route: Tensor, adapters: object, per_adapter: object, names: tuple[str, ...]) -> Tensor:
    if adapters is not None:
        raise ValueError("one_pass: adapters and route exclude each other")
    if per_adapter:
        raise ValueError("one_pass: per_adapter and route exclude each other")
    if not isinstance(route, Tensor) or route.dtype not in (torch.int32, torch.int64) or route.dim() != 1:
        got = f"{route.dtype} {list(route.shape)}" if isinstance(route, Tensor) else type(route).__name__
        raise TypeError(f"one_pass: route must be an int32 or int64 tensor [B], got {got}")
    if route.device.type == "cpu" and len(route) and not -1 <= route.min() <= route.max() < len(names):
        raise IndexError(f"one_pass: route must hold places of {len(names)} adapters, or -1, got {route.tolist()}")
    return route
