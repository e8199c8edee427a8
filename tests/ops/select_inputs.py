"""Makes tokens whose class is beyond doubt, and compares select_tokens of them with the float64 reference."""

from __future__ import annotations

import functools

import calls
import torch
from calls import Call, normal
from torch import Tensor

from fastcss._cosine import unit
from fastcss.ops import select_tokens

# A cosine keeps this distance from the threshold, and a token's best class from the second. The cosine of two rounded
# unit rows is off by 2.5 / √D of this unit, and then rounded itself.
UNIT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def make(
    batch, count, classes, width, length, *, threshold=0.1, dtype=torch.float32, device="cpu", seed=0, **options
) -> Call:
    """Tokens whose classes no rounding changes: those too near to two of them or to the threshold are drawn again."""
    text = normal(batch, classes, width, seed=seed).to(dtype)
    tokens = normal(batch, count, width, seed=seed + 1).to(dtype)
    for again in range(2, 200):
        unclear = ~clear(tokens, text, threshold, UNIT[dtype])
        if not unclear.any():
            break
        tokens = torch.where(unclear[..., None], normal(*tokens.shape, seed=seed + again).to(dtype), tokens)
    else:
        raise AssertionError("no such tokens")
    options |= {"threshold": threshold, "length": length}
    return Call(select_tokens, {"tokens": tokens.to(device), "classes": text.to(device)}, options)


def cosines(tokens: Tensor, classes: Tensor) -> Tensor:
    return unit(tokens.double()) @ unit(classes.double()).mT  # [B, N, C]


def clear(tokens: Tensor, classes: Tensor, threshold: float, unit: float) -> Tensor:
    """[B, N]"""
    cosine, off = cosines(tokens, classes), 2.5 / tokens.shape[2] ** 0.5
    near = ((cosine - threshold).abs() < unit * (off + abs(threshold))).any(2)
    best = cosine.sort(dim=2, descending=True).values
    return ~near if classes.shape[1] == 1 else ~near & (best[..., 0] - best[..., 1] >= unit * (off + 1))


CASES = {  # B, N, C, D, length
    "one element": (1, 1, 1, 1, 1),
    "no images": (0, 5, 3, 4, 9),
    "no tokens": (2, 0, 3, 4, 9),
    "one class": (2, 31, 1, 33, 70),
    "one token": (2, 1, 20, 33, 70),
    "part of a token": (2, 97, 3, 65, 40),
    "C 21": (2, 97, 21, 33, 150),
    "all and zeros": (1, 33, 5, 21, 1000),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 1500": (2, 1500, 20, 64, 128), "C 150": (1, 577, 150, 130, 260), "D 256": (1, 300, 20, 256, 512)}


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, **options) -> None:
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(peers, call), **options)


def peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a cosine is what is left of that of a product: nothing, where the two rows are parallel."""
    if name == "dclasses":
        count = (cosines(**call.tensors) >= call.options["threshold"]).sum(1)
        if call.options.get("presence") == "best":
            count = exact["counts"]
        slope = dys[2].double() / count.clamp(min=1).sqrt() / call.tensors["classes"].double().norm(dim=-1)
        return [exact[name], torch.where(count > 0, slope, 0)]
    return [exact[name]]
