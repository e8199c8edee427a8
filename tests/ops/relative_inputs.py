"""Makes inputs of relative attention, of any map and window."""

from __future__ import annotations

import calls
import torch
from calls import Call, normal
from torch import Tensor

from fastcss.ops import relative_attention

PADS = ("pad_key", "pad_value")
TABLES = ("rel_h", "rel_w")
TENSORS = ("q", "k", "v", *TABLES, *PADS)

CASES = {  # B, H, W, heads, D, window
    "one of everything": (1, 1, 1, 1, 1, None),
    "no images": (0, 5, 3, 2, 4, None),
    "no rows": (2, 0, 5, 2, 4, None),
    "no columns": (2, 5, 0, 2, 4, 2),
    "one token": (3, 1, 1, 2, 8, None),
    "one row": (1, 1, 7, 2, 5, None),
    "one column": (2, 7, 1, 2, 8, None),
    "map": (3, 5, 7, 2, 8, None),
    "higher than wide": (1, 9, 4, 3, 33, None),
    "wider than a tile": (1, 2, 35, 1, 8, None),
    "window 1": (2, 1, 3, 2, 5, 1),
    "window 2": (3, 4, 6, 1, 5, 2),
    "to fill below": (2, 5, 6, 2, 5, 3),
    "to fill at the right": (1, 6, 5, 3, 5, 3),
    "to fill both": (1, 5, 7, 2, 16, 4),
    "of one row": (1, 1, 7, 2, 5, 3),
    "smaller than the window": (2, 3, 4, 2, 5, 7),
    "one token in a window": (1, 1, 1, 2, 8, 3),
}
# These have the models' head widths.
LARGE = {
    "map, 64": (1, 13, 17, 2, 64, None),
    "map, 80": (2, 17, 12, 1, 80, None),
    "window 14, 64": (1, 17, 16, 2, 64, 14),
    "window 14, 80": (1, 14, 15, 1, 80, 14),
}


def make(
    batch, height, width, heads, channels, window, *, pads=PADS, dtype=torch.float32, device="cpu", seed=0
) -> Call:
    size = (height, width) if window is None else (window, window)
    shapes = dict.fromkeys("qkv", (batch, height, width, heads, channels))
    shapes |= {name: (max(1, 2 * length - 1), channels) for name, length in zip(TABLES, size, strict=True)}
    shapes |= dict.fromkeys(pads, (heads, channels))
    tensors = {n: normal(*shape, seed=seed + i, dtype=dtype) for i, (n, shape) in enumerate(shapes.items())}
    # Scores of unit size: the tables' products with q are not scaled.
    tensors |= {name: tensors[name] * max(1, channels) ** -0.5 for name in TABLES}
    return Call(relative_attention, tensors, {"window": window}).map(lambda tensor: tensor.to(device))


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    """Call ``calls.assert_as_good_as_eager``. The scores' gradients of a query are 0 in sum, and so is the gradient of
    the table of an axis that has one place only: what roundings leave of it counts beside the other table's."""

    def counted(name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
        return [exact[f"d{table}"] for table in TABLES] if name.startswith("drel") else [exact[name]]

    calls.assert_as_good_as_eager(call, impl, tolerance, peers=counted, **options)
