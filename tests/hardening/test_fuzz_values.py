"""Every op at random with elements that are hard: NaN, infinite, nearly nothing, or as large as a product can take."""

from __future__ import annotations

import math

import pytest
import torch
from calls import Call, runs
from hypothesis import given
from hypothesis import strategies as st
from left_out import points
from op_calls import OPS
from test_fuzz import draw_call

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"nan": [math.nan], "infinite": [math.inf, -math.inf], "extreme": [1e15, -1e15, 1e-42, -1e-42, -0.0]}
#: The ops' own tests know that these differ from the literal code, and say why.
KNOWN = {
    ("nan", "merge_masks"): "a tap of weight 0 may count",
    ("infinite", "merge_masks"): "a tap of weight 0 may count",
    ("infinite", "class_affinity"): "an infinite centre is another one in the other order of the products",
    ("extreme", "class_affinity"): "what is read of unlike pixels is exact at the size of all of them",
    ("extreme", "class_centers"): "the centre of a class without any mass is no 0 / 0",
}
#: An option with which they do: the text reads no infinite logit of an image token that is masked.
WITHOUT = {("infinite", "bi_attention"): "image_mask"}


def with_elements(data: st.DataObject, call: Call, values: list[float]) -> Call:
    """Up to three elements are among ``values``."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in call.tensors.items() if tensor.numel()}
    for _ in range(data.draw(st.integers(1, 3), "elements") if tensors else 0):
        tensor = tensors[data.draw(st.sampled_from(sorted(tensors)), "name")].view(-1)
        tensor[data.draw(st.integers(0, len(tensor) - 1), "at")] = data.draw(st.sampled_from(values), "value")
    return call.having(**tensors)


def assert_like_eager(call: Call, impl: str) -> None:
    """Finite where the literal code is, with its values, and no NaN of its results is lost.

    Its gradients may be NaN where ours are not: 0 times what is read by nobody is not computed. Of large elements they
    are what a sum of large terms leaves: its rounding.
    """
    gradients = call.output_gradients()
    want, got = (call.leaves().results(name, gradients) for name in ("reference", impl))
    slopes = [f"d{name}" for name in call.tensors]
    large = any((tensor.isfinite() & (tensor.abs() > 1e10)).any() for tensor in call.tensors.values())
    for name in want:
        if name == "cost" and not torch.equal(got["index"], want["index"]):  # kept for scores that are a rounding apart
            torch.testing.assert_close(got["score"], want["score"], rtol=0, atol=1e-6, equal_nan=True)
            return
        theirs, ours = want[name], got[name]
        finite = theirs.isfinite()
        assert ours[finite].isfinite().all(), name
        assert name in slopes or not ours[theirs.isnan()].isfinite().any(), name
        exact = theirs.is_floating_point() or all(tensor.isfinite().all() for tensor in want.values())
        if finite.any() and exact and not (large and name in slopes):
            size = max(1, theirs[finite].abs().max().item())
            torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-3, atol=1e-4 * size, msg=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", KINDS)
@points(lambda kind, op: (kind, op) not in KNOWN, "an op's own tests know it, and say why")
def test_hard_elements(kind, op, device, fuzz):
    runs("cpu", device)

    @fuzz(1 / 3)
    @given(st.data())
    def check(data):
        call = draw_call(data, op, "cpu", torch.float32, device)
        call.options.pop(WITHOUT.get((kind, op)), None)
        assert_like_eager(with_elements(data, call, KINDS[kind]), "cpu")

    check()
