"""Takes tiles that were measured to be the fastest on a GPU, in place of those that the host code would choose."""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton

from .._dispatch.private_apis import gpu_architecture
from .tuned_tiles import TILES

#: Maps the "<file>.<function>" that chooses a tile to the sizes of it that may change; results differ by rounding only.
FREE: dict[str, tuple[str, ...]] = {}


def tuned(*free: str) -> Callable:
    """Decorate a function from sizes to a tile: the table's tile is used if it has one for these sizes.

    Only the ``free`` sizes of a tile, its warps and its stages may differ. The function's arguments must not depend on
    the batch, so that the tile does not either.
    """

    def decorate(choose: Callable[..., dict]) -> Callable[..., dict]:
        name = f"{choose.__module__.rpartition('.')[2]}.{choose.__name__}"
        FREE[name] = (*free, "num_warps", "num_stages")

        @functools.wraps(choose)
        def tile(*sizes, **more) -> dict:
            chosen, table = choose(*sizes, **more), _table()
            return chosen if table is None else table.get(size_class(name, (*sizes, *more.values())), chosen)

        return tile

    return decorate


def _table() -> dict[str, dict] | None:
    if not TILES or triton.knobs.runtime.interpret:
        return None
    return TILES.get(gpu_architecture())


def size_class(name: str, sizes: tuple) -> str:
    """Name the sizes, as "multi_lora.expand_tile 32768 256 32 bfloat16 write"; numbers go up to a power of two."""
    return " ".join((name, *(_class_of(size) for size in sizes)))


def _class_of(size: object) -> str:
    if isinstance(size, tuple):
        return ",".join(_class_of(part) for part in size)
    if isinstance(size, int) and not isinstance(size, bool):
        return str(triton.next_power_of_2(size))
    return str(size).removeprefix("torch.")
