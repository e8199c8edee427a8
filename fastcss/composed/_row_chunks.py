"""Works on a map of rows by columns a few rows at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._dispatch.autograd import needs_grad
from .._dispatch.private_apis import is_wrapped

# So many elements of the map exist at a time. With their temporaries they stay in the second-level cache of a CPU, and
# they keep a GPU busy.
ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}


def row_chunks(
    compute: Callable, rows: tuple[Tensor, ...], whole: tuple[Tensor, ...], columns: int | None = None
) -> Iterator:
    """Yield ``compute(*chunk of rows, *whole)`` for chunks of the rows (dimension 1).

    Backward computes each chunk again. The map has as many ``columns`` as rows by default. Zero rows make one chunk.
    """
    batch, n = rows[0].shape[:2]
    size = max(1, ELEMENTS.get(rows[0].device.type, 1 << 22) // max(1, batch * (columns or n)))
    # torch.func does not support checkpoints, so the chunks are kept there.
    again = needs_grad(*rows, *whole) and (
        torch.compiler.is_compiling() or not any(is_wrapped(tensor) for tensor in (*rows, *whole))
    )
    pieces = (tensor.split(size, dim=1) for tensor in rows)  # the gradient of a slice would be as large as its tensor
    for piece in zip(*pieces, strict=True):
        if again:
            yield checkpoint(compute, *piece, *whole, use_reentrant=False, preserve_rng_state=False)
        else:
            yield compute(*piece, *whole)
