"""Computes what PiSSA and OLoRA take out of a base layer when an adapter begins, as PEFT does when it loads one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .read_adapters import LoraWeights, is_conv1d

CONVERT = "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=…)"
NOT_REPEATABLE = {
    "pissa_niter": f"draws the decomposition of the base weights at random, and the folder does not hold it; {CONVERT}",
    "corda": f"took out of the base weights what its calibration data told, and the folder does not hold it; {CONVERT}",
    "lora_ga": f"took out of the base weights what its gradients told, and the folder does not hold it; {CONVERT}",
    "loftq": "was trained beside quantised base weights, which the folder does not hold; fold it into them by peft",
}


def why_not_repeatable(init: object) -> str | None:
    """Return why an adapter's base layers cannot be restored as they were in its training, or None if they can."""
    if not isinstance(init, str):
        return None
    return next((why for start, why in NOT_REPEATABLE.items() if init.lower().startswith(start)), None)


def with_taken_out(weights: LoraWeights, base: nn.Module, init: object) -> LoraWeights:
    """Return ``weights`` that run beside the whole base layer, if ``init`` has them run beside a reduced one.

    PEFT trains ``x (W − s B₀ A₀)ᵀ + s x (B A)ᵀ`` with A₀, B₀ from a decomposition of W, and decomposes W anew on
    loading. This equals plain LoRA with the rows of A₀ below those of A, and −B₀ beside B: W serves every adapter.
    """
    method = init.lower() if isinstance(init, str) else None
    if method not in ("pissa", "olora") or isinstance(base, nn.Embedding):  # PEFT initialises embeddings as usual
        return weights
    if weights.magnitude is not None:
        raise TypeError(
            f"init_lora_weights={init!r} with use_dora, whose dropout is of the reduced base layer; {CONVERT}"
        )
    if isinstance(base, nn.Conv2d) or (method == "olora" and is_conv1d(base)):
        raise TypeError(f"init_lora_weights={init!r} on {type(base).__name__}, which PEFT itself does not load")
    weight = base.weight.detach().float()
    rank = weights.a.shape[0]
    if method == "pissa":
        a, b = _principal(weight.t() if is_conv1d(base) else weight, rank, weights.scale)
    else:
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank], q[:, :rank]
    joined_a, joined_b = torch.cat([weights.a, a.to(weights.a)]), torch.cat([weights.b, -b.to(weights.b)], 1)
    return dataclasses.replace(weights, a=joined_a, b=joined_b, taken_out=a.shape[0])


def _principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A₀ [r, K] and B₀ [N, r] so that s B₀ A₀ is the best approximation of ``weight`` [N, K] at this rank."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
