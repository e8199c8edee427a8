"""Has what only the affinity ops need: errors relative to another size than their own, and the sigmoid's ends."""

from __future__ import annotations

import functools

import calls
import torch
from calls import Call
from torch import Tensor


def assert_as_good_as_eager(call: Call, impl: str, tolerance: float, *, flat: bool = False, **options) -> None:
    """Call ``calls.assert_as_good_as_eager``.

    ``flat`` means that the sigmoid is flat nearly everywhere. Errors of dq and dk then count relative to the size that
    these have where it is steep, at logits of 0: an error of the sigmoid is relative to its full range, and so is one
    of its slope.
    """
    calls.assert_as_good_as_eager(call, impl, tolerance, peers=functools.partial(_peers, call, flat), **options)


def _peers(call: Call, flat: bool, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
    if name in ("intra", "inter") and call.op.__name__ == "affinity_attention":
        # Both are complementary shares of one sum: if M is 1 − 1e-13, inter is 1e-13 of it, and the sum's rounding
        # stays in it. The docstring promises exactness at the size of the sum.
        return [exact["intra"], exact["inter"]]
    if flat and name in ("dq", "dk"):
        steep = call.having(**{name[1:]: torch.zeros_like(call.tensors[name[1:]])})
        return [exact[name], steep.leaves(torch.float64).results("reference", dys)[name]]
    if name == "dlogits":
        # w (f · dc − c · dc), c the centre that w gives: nothing is left if the pixels are all alike, or only one.
        logits, feats = (tensor.double() for tensor in call.tensors.values())
        weights = (logits.log_softmax(1) if call.options["over"] == "classes" else logits).softmax(2)
        return [exact[name], weights * (dys[0].double() @ feats.mT)]
    return [exact[name]]


def saturated(call: Call, logit: float) -> Call:
    """Change the call so that all pairs have nearly this logit."""
    q, k = call.tensors["q"], call.tensors["k"]
    width = q.shape[-1]
    return call.having(q=1 + q / width, k=(logit + k) / width)


def to_ten_thousand(call: Call) -> Call:
    """Change the call's logits to ±10⁴, ±200, ±4 and 0, which any dtype holds: flat and steep ones are mixed."""
    *shape, width = call.tensors["q"].shape
    levels = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0])
    picks = (torch.randint(5, (*shape, 1), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    q, k = (levels[pick].expand(*shape, width).to(call.tensors["q"]) for pick in picks)
    return call.having(q=q, k=k, scale=4 / width)


#: The ends of the sigmoid, and how to get there.
ENDS = {logit: functools.partial(saturated, logit=logit) for logit in (30, -30, 80, -80)} | {10**4: to_ten_thousand}
