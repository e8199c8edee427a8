"""relative_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import calls
import checks
import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS, LAYOUTS, NOT_OF_64_BITS, normal
from left_out import light
from relative_inputs import CASES, LARGE, PADS, TENSORS, assert_as_good_as_eager, make
from torch import Tensor

from fastcss.ops import relative_attention

WINDOWED = pytest.mark.parametrize("case", ["map", "to fill both"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case in CASES and (dtype == torch.float32 or case == "to fill both"))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("pads", [(), *((name,) for name in PADS)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda pads: pads == PADS[:1])
def test_tokens_that_fill_up(impl, pads, device, tolerances):
    """Have keys and values of zero unless told."""
    call = make(*CASES["to fill both"], pads=pads, device=device)
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda: False)
def test_tokens_that_fill_up_are_as_any(impl, device):
    """A map filled up by hand is the same there, and where nothing is to fill up nothing depends on them."""
    call = make(2, 5, 7, 3, 16, 4, device=device)
    filled = {}
    for name in "qkv":
        x = call.tensors[name]
        whole = x.new_zeros(2, 8, 8, 3, 16)
        if name != "q":
            whole += call.tensors["pad_key" if name == "k" else "pad_value"]
        whole[:, :5, :7] = x
        filled[name] = whole
    by_hand = call.having(**filled)
    torch.testing.assert_close(call(impl)[0], by_hand(impl)[0][:, :5, :7])
    for window in (4, None):
        shape = (2, 8, 8, 3, 16, window)
        full = make(*shape, device=device)
        without = full.having(**{name: full.tensors[name] * math.nan for name in PADS})
        assert torch.equal(full(impl)[0], without(impl)[0])
        got = full.leaves().results(impl, full.output_gradients())
        assert not any(got[f"d{name}"].count_nonzero() for name in PADS)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_a_window_of_the_maps_size_is_the_map(impl, device):
    call = make(2, 4, 4, 2, 8, 4, device=device)
    assert torch.equal(call(impl)[0], call.having(window=None)(impl)[0])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equation(impl, device):
    """Tables so steep that each token reads the one at a given distance, and q that is not scaled with them."""
    q, k = torch.ones(1, 3, 4, 1, 1, device=device), torch.zeros(1, 3, 4, 1, 1, device=device)
    v = torch.arange(12.0, device=device).view(1, 3, 4, 1, 1)
    rel_h, rel_w = torch.zeros(5, 1, device=device), torch.zeros(7, 1, device=device)
    options = {"impl": impl, "scale": 1e-3}
    even = relative_attention(q, k, v, rel_h, rel_w, **options)
    torch.testing.assert_close(even, torch.full_like(even, 5.5))
    rel_h[2], rel_w[3 + 1] = 100, 100  # of its own row, the token one column to the left
    got = relative_attention(q, k, v, rel_h, rel_w, **options)[0, :, :, 0]
    torch.testing.assert_close(got[:, 1:], v[0, :, :3, 0, 0])
    assert got[:, 0].tolist() == pytest.approx([1.5, 5.5, 9.5])  # there is none: its row alike
    rel_h[2], rel_h[2 - 1] = 0, 100  # and of the row below
    got = relative_attention(q, k, v, rel_h, rel_w, **options)[0, :, :, 0]
    torch.testing.assert_close(got[:2, 1:], v[0, 1:, :3, 0, 0])
    # q of the other sign reads anything but those.
    got = relative_attention(-q, k, v, rel_h, rel_w, **options)[0, 0, 1, 0]
    assert got.item() == pytest.approx((1 + 2 + 3 + 9 + 10 + 11) / 6)


@pytest.mark.parametrize("scale", [0.0, -1.5, 3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda scale: scale == -1.5)
def test_scale(impl, scale, device, tolerances):
    call = make(*CASES["map"], device=device)
    assert_as_good_as_eager(call.having(scale=scale), impl, tolerances[torch.float32])
    assert torch.equal(call(impl)[0], call.having(scale=8**-0.5)(impl)[0])


@WINDOWED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype, case: dtype == torch.float32 and case == "to fill both")
def test_large_scores(impl, dtype, case, device, tolerances):
    """In every order of summation the scores are exact: what they would lose, an exponential makes the whole error
    of."""
    call = make(3, *CASES[case][1:], dtype=dtype, device=device)
    whole = {name: (8 * call.tensors[name]).round() for name in ("q", "rel_h", "rel_w")}
    quarters = {name: (4 * call.tensors[name]).round() / 4 for name in ("k", "pad_key")}
    assert_as_good_as_eager(call.having(**whole, **quarters, scale=0.25), impl, tolerances[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_scores_that_grow(impl, device, tolerances):
    """From one part of the keys to the next, and to a softmax that forgets all before: 400 keys, some of them −∞."""
    call = make(1, 20, 20, 1, 8, None, device=device)
    k = call.tensors["k"] * torch.linspace(0, 12, 400, device=device).view(1, 20, 20, 1, 1)
    for keys in (k, k.flip(1)):
        assert_as_good_as_eager(call.having(k=keys), impl, tolerances[torch.float32])
    with torch.no_grad():
        hidden = k.clone()
        hidden[:, :15] = -math.inf
        call = call.having(k=hidden, q=call.tensors["q"].abs())
        torch.testing.assert_close(call(impl)[0], call("reference")[0])


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", TENSORS)
@WINDOWED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, name, bad: case == "to fill both" and name in ("q", "rel_w") and bad != math.inf)
def test_not_finite(impl, case, name, bad, device):
    """Is NaN where it is read, and nothing elsewhere.

    In the literal code also queries that are thrown away read it, 0 times what is not finite, and so gradients are NaN
    that need not be.
    """
    call = make(2, *CASES[case][1:], device=device)
    if case == "map" and name in PADS:
        assert torch.equal(call(impl)[0], call.having(**{name: call.tensors[name] * bad})(impl)[0])
        return
    call.tensors[name][(1, 2, 4, 1, 2)[-call.tensors[name].dim() :]] = bad
    if case == "map":
        return checks.assert_not_finite_as_reference(call, impl)
    dys = call.output_gradients()
    want, got = (call.leaves().results(of, dys) for of in ("reference", impl))
    assert torch.equal(got["relative_attention"].isfinite(), want["relative_attention"].isfinite())
    assert not got["relative_attention"].isfinite().all()
    for of in want:
        assert not (want[of].isfinite() & ~got[of].isfinite()).any(), of


# --- strides ---------------------------------------------------------------------------------------------------------


@WINDOWED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout, case: layout == "a slice" and case == "map")
def test_any_strides(impl, layout, case, device, tolerances):
    call = make(*CASES[case], device=device)
    call = call.having(**{name: calls.laid_out(tensor, LAYOUTS[layout]) for name, tensor in call.tensors.items()})
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@WINDOWED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thirds_of_one_projection(impl, case, device, tolerances):
    """q, k and v must be read from where the model's one linear layer put them."""
    call = make(*CASES[case], device=device)
    thirds = torch.stack([call.tensors[name] for name in "qkv"], dim=3).unbind(3)
    call = call.having(**dict(zip("qkv", thirds, strict=True)))
    assert not any(call.tensors[name].is_contiguous() for name in "qkv")
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


# --- what others compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "window"), [((6, 6), 0), ((8, 4), 4), ((5, 7), 4), ((3, 2), 4)], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda size: size == (5, 7))
@NOT_OF_64_BITS
def test_in_place_of_transformers_own(impl, size, window, dtype, device):
    """The layer's output and all inputs' gradients must be those of transformers' layer, between its linear layers."""
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    torch.manual_seed(0)
    config = sam.SamVisionConfig(  # "eager" rounds its softmax to float32
        hidden_size=24, num_attention_heads=3, mlp_dim=8, image_size=96, attn_implementation="sdpa"
    )
    layer = sam.SamVisionLayer(config, window).to(device, dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    attention = layer.attn
    x = normal(2, *size, 24, dtype=dtype, device=device).requires_grad_()

    def ours() -> Tensor:
        q, k, v = attention.qkv(layer.layer_norm1(x)).unflatten(3, (3, 3, 8)).unbind(3)
        pads = dict(zip(("pad_key", "pad_value"), attention.qkv.bias.view(3, 3, 8)[1:], strict=True))
        tables = attention.rel_pos_h, attention.rel_pos_w
        y = x + attention.proj(relative_attention(q, k, v, *tables, window=window or None, **pads, impl=impl))
        return y + layer.mlp(layer.layer_norm2(y))

    dout = normal(2, *size, 24, seed=1, dtype=dtype, device=device)
    leaves = [x, *layer.parameters()]
    found = [[y.detach(), *torch.autograd.grad(y, leaves, dout)] for y in (ours(), layer(x))]
    for got, want in zip(*found, strict=True):
        assert torch.linalg.vector_norm(got - want) <= (1e-5 if dtype == torch.float32 else 1e-13) * max(
            torch.linalg.vector_norm(tensor) for tensor in (want, found[1][0])
        )


# --- what one implementation refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl == "triton"])
def test_heads_wider_than_a_tile(impl, device):
    call = make(1, 2, 3, 1, 257, None, device=device)
    with pytest.raises(ValueError, match="impl='triton' takes heads of up to 256 columns, got 257"):
        call(impl)
