"""multi_lora of adapters whose rows lie anywhere in a larger allocation, and of adapters that few rows run through."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import IMPLEMENTATIONS
from lora_inputs import make

from fastcss import multi_lora

RANKS = (3, 0, 17, 1, 5)
MODES = {
    "shared": {"mode": "shared", "rows": (5,)},
    "diverged": {"mode": "diverged", "rows": (9,)},
    "routed": {"mode": "routed", "rows": (3,), "index": [2, -1, 4, 2, 3, 1, 0]},
    "routed, one row": {"mode": "routed", "rows": (1,), "index": [2, -1, 4, 2, 3, 1, 0] * 3},
    "routed, many rows": {"mode": "routed", "rows": (70,), "index": [4, -1, 2]},
}


def scattered(inputs):
    """The same adapters as rows [A | B] of one allocation, in another order, with NaN between them."""
    (total, k), n = inputs.a.shape, inputs.b.shape[1]
    arena = inputs.a.new_full((2 * total + 9, k + n), float("nan"))
    spans, end = [None] * len(inputs.lora.ranks), len(arena)
    for t, rank in enumerate(inputs.lora.ranks):
        first = inputs.lora.offsets[t]
        end -= rank + 2
        arena[end : end + rank] = torch.cat([inputs.a[first : first + rank], inputs.b[first : first + rank]], 1)
        spans[t] = end, end + rank
    offsets = torch.tensor(spans, dtype=torch.int32, device=arena.device)
    return dataclasses.replace(inputs.lora, a=arena[:, :k], b=arena[:, k:], offsets=offsets)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_anywhere_give_what_packed_rows_give(impl, mode, device):
    inputs = make(**MODES[mode], k=37, n=29, ranks=RANKS, device=device)
    x = inputs.x.requires_grad_()
    options = {"mode": inputs.mode, "index": inputs.index, "impl": impl}
    want = inputs.call(impl)
    got = multi_lora(x, inputs.weight, scattered(inputs), inputs.bias, **options)
    (wanted,), (gradient,) = (torch.autograd.grad(y, x, torch.ones_like(y)) for y in (want, got))
    if impl == "triton":  # whose ranks are padded here
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient, wanted)
    else:
        assert torch.equal(got, want)
        assert torch.equal(gradient, wanted)


def test_rows_anywhere_that_cannot_run():
    inputs = make("routed", (3,), 37, 29, RANKS, index=[2, -1, 4])
    lora = scattered(inputs)
    options = {"mode": "routed", "impl": "cpu"}
    gone = lora.offsets.clone()
    gone[4] = -1
    with pytest.raises(RuntimeError, match="adapter 4 has no rows in a and b"):
        multi_lora(inputs.x, inputs.weight, dataclasses.replace(lora, offsets=gone), index=inputs.index, **options)
    gone[4] = torch.tensor([len(lora.a) - 1, len(lora.a) + 1])
    with pytest.raises(RuntimeError, match="adapter 4 has no rows in a and b"):
        multi_lora(inputs.x, inputs.weight, dataclasses.replace(lora, offsets=gone), index=inputs.index, **options)
    with pytest.raises(IndexError, match="index must be in"):
        multi_lora(inputs.x, inputs.weight, lora, index=torch.tensor([0, 5, 1]), **options)
    wrong = dataclasses.replace(lora, offsets=lora.offsets[:4])
    with pytest.raises(ValueError, match=r"lora.offsets must be torch.int32 \[5, 2\] for 5 adapters"):
        multi_lora(inputs.x, inputs.weight, wrong, index=inputs.index, **options)
    trained = dataclasses.replace(lora, a=lora.a.clone().requires_grad_())
    with pytest.raises(ValueError, match="must not require gradients"):
        multi_lora(inputs.x, inputs.weight, trained, index=inputs.index, **options)


@pytest.mark.parametrize(("rows", "n", "rank"), [(1, 1100, 5), (2, 29, 3), (5, 48, 600), (11, 64, 4)])
def test_an_adapter_of_few_rows_is_read_in_place_with_the_same_bits(rows, n, rank):
    """Alone, among others that are read in place too, and where its rows are so many that it is packed."""
    ranks, few = tuple(rank + t % 3 for t in range(20)), torch.arange(20)
    many = torch.cat([few, few[:1].expand(13 * 20 * 2)])
    inputs = make("routed", (rows,), 37, n, ranks, index=many.tolist())
    inputs.x[20:] = inputs.x[0]

    def call(of):
        return inputs._replace(x=inputs.x[of], index=inputs.index[of]).call("cpu")

    together, packed = call(slice(20)), call(slice(None))
    assert torch.equal(packed[:20], together)
    assert torch.equal(packed[20:], together[:1].expand(len(many) - 20, -1, -1))
    for s in (0, 7, 19):
        assert torch.equal(call(slice(s, s + 1))[0], together[s])
    want = inputs._replace(x=inputs.x[:20].double(), weight=inputs.weight.double(), bias=inputs.bias.double(),
                           a=inputs.a.double(), b=inputs.b.double(), index=few).call("reference")  # fmt: skip
    torch.testing.assert_close(together.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
