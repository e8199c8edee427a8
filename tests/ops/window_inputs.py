"""Makes inputs of window attention, of any map and window."""

from __future__ import annotations

import calls
import torch
from calls import Call, normal
from torch import Tensor

from fastcss.ops import window_attention

PADS = ("pad_key", "pad_value")
TENSORS = ("q", "k", "v", "bias", *PADS)

CASES = {  # B, H, W, heads, D, window, shift
    "one of everything": (1, 1, 1, 1, 1, 1, 0),
    "no images": (0, 5, 3, 2, 4, 2, 1),
    "no rows": (2, 0, 5, 2, 4, 2, 1),
    "no columns": (2, 5, 0, 2, 4, 2, 0),
    "window 1": (2, 1, 3, 2, 5, 1, 0),
    "window 2": (3, 4, 6, 1, 5, 2, 0),
    "window 2, shift 1": (3, 4, 6, 1, 5, 2, 1),
    "to fill below": (2, 5, 6, 2, 5, 3, 0),
    "to fill at the right": (1, 6, 5, 3, 5, 3, 1),
    "to fill both": (2, 5, 7, 2, 16, 4, 2),
    "shift of all but one": (1, 5, 7, 2, 5, 4, 3),
    "of one row": (1, 1, 7, 2, 5, 3, 1),
    "smaller than the window": (2, 3, 4, 2, 5, 7, 3),
    "lower than the window": (1, 2, 9, 2, 33, 4, 1),
}
# These have the models' sizes.
LARGE = {
    "window 7": (2, 14, 21, 3, 32, 7, 0),
    "window 7, shift 3": (1, 15, 20, 3, 32, 7, 3),
    "window 8": (1, 17, 9, 2, 33, 8, 4),
    "window 12": (1, 25, 13, 2, 32, 12, 6),
}


def make(
    batch, height, width, heads, channels, window, shift, *, pads=PADS, dtype=torch.float32, device="cpu", seed=0
) -> Call:
    area = window * window
    shapes = dict.fromkeys("qkv", (batch, height, width, heads, channels))
    shapes |= {"bias": (heads, area, area)} | dict.fromkeys(pads, (heads, channels))
    tensors = {n: normal(*shape, seed=seed + i, dtype=dtype) for i, (n, shape) in enumerate(shapes.items())}
    return Call(window_attention, tensors, {"window": window, "shift": shift}).map(lambda tensor: tensor.to(device))


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    """Call ``calls.assert_as_good_as_eager``. A gradient that comes only through tokens that are no neighbours counts
    as nothing: it is e^-100 of the others, less than a float32 of full precision."""

    def counted(name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
        return [exact[name] if exact[name].abs().amax() > 1e-35 else torch.ones(())]

    calls.assert_as_good_as_eager(call, impl, tolerance, peers=counted, **options)
