"""window_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import calls
import checks
import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS, LAYOUTS, NOT_OF_64_BITS, normal
from left_out import light
from torch import Tensor
from window_inputs import CASES, LARGE, PADS, assert_as_good_as_eager, make

from fastcss.ops import window_attention

EACH_PAD = pytest.mark.parametrize("pads", [(), *((name,) for name in PADS), PADS], ids=" ".join)
SHIFTED = pytest.mark.parametrize("case", ["to fill below", "to fill both"], ids=["no shift", "shift"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case in CASES and (dtype == torch.float32 or case == "to fill both"))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@EACH_PAD
@SHIFTED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, pads: pads == PADS[:1] or (not pads and case == "to fill both"))
def test_tokens_that_fill_up(impl, case, pads, device, tolerances):
    """Have keys and values of zero unless told."""
    call = make(*CASES[case], pads=pads, device=device)
    assert_as_good_as_eager(
        call,
        impl,
        tolerances[torch.float32],
    )


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda: False)
def test_tokens_that_fill_up_are_as_any(impl, device):
    """A map filled up by hand is the same there, and where nothing is to fill up nothing depends on them."""
    for shift in (0, 2):
        call = make(2, 5, 7, 3, 16, 4, shift, device=device)
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
        without = by_hand.having(**{name: call.tensors[name] * math.nan for name in PADS})
        assert torch.equal(by_hand(impl)[0], without(impl)[0])
        got = by_hand.leaves().results(impl, by_hand.output_gradients())
        assert not any(got[f"d{name}"].count_nonzero() for name in PADS)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_is_the_equation(impl, device):
    """One head, values 0 … 15 on a map of 4 × 4, windows of 2 × 2: means of who attends to whom, by hand."""
    zeros = torch.zeros(1, 4, 4, 1, 1, device=device)
    v = torch.arange(16.0, device=device).view(1, 4, 4, 1, 1)

    def attend(window, shift=0, bias=None, **pads):
        bias = torch.zeros(1, window**2, window**2, device=device) if bias is None else bias
        return window_attention(zeros, zeros, v, bias, window, shift=shift, impl=impl, **pads)[0, :, :, 0].tolist()

    assert attend(1) == v[0, :, :, 0, 0].tolist()
    upper, lower = [2.5, 2.5, 4.5, 4.5], [10.5, 10.5, 12.5, 12.5]
    assert attend(2) == [upper, upper, lower, lower]
    # Shifted, one window in the middle; those at the edges hold only what is next to each other.
    want = [[0.0, 1.5, 1.5, 3.0], [6, 7.5, 7.5, 9], [6, 7.5, 7.5, 9], [12, 13.5, 13.5, 15]]
    assert attend(2, 1) == [pytest.approx(row) for row in want]
    # The bias is of (query, key): each reads the first of its window, but the last reads itself.
    bias = torch.full((1, 4, 4), -1e4, device=device)
    bias[0, :3, 0] = bias[0, 3, 3] = 0
    assert attend(2, 0, bias) == [[0, 0, 2, 2], [0, 5, 2, 7], [8, 8, 10, 10], [8, 13, 10, 15]]
    # A window of 3 × 3 in the lower right corner has one token of the map, and eight with the value 24.
    got = attend(3, pad_value=torch.full((1, 1), 24.0, device=device))
    assert got[3] == pytest.approx([(12 + 13 + 14 + 6 * 24) / 9] * 3 + [(15 + 8 * 24) / 9])
    assert got[0] == pytest.approx([5.0] * 3 + [(3 + 7 + 11 + 6 * 24) / 9])


@pytest.mark.parametrize("scale", [5**-0.5, 0.0, -1.5, 3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda scale: scale == -1.5)
def test_scale(impl, scale, device, tolerances):
    """1 / √D unless told."""
    call = make(*CASES["window 2, shift 1"], device=device)
    if scale == 5**-0.5:
        assert torch.equal(call(impl)[0], call.having(scale=scale)(impl)[0])
    assert_as_good_as_eager(call.having(scale=scale), impl, tolerances[torch.float32])


@SHIFTED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda dtype, case: dtype == torch.float32 and case == "to fill both")
def test_large_scores(impl, dtype, case, device, tolerances):
    """Some so large that they are read in spite of the -100 between tokens that are no neighbours.

    In every order of summation the scores are exact: what they would lose, an exponential makes the whole error of.
    """
    call = make(*CASES[case], dtype=dtype, device=device)
    q, k, pad_key, bias = (call.tensors[name] for name in ("q", "k", "pad_key", "bias"))
    quarters = {"k": (4 * k).round() / 4, "pad_key": (4 * pad_key).round() / 4}
    call = call.having(q=(30 * q).round(), bias=(10 * bias).round(), scale=0.25, **quarters)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_who_is_no_neighbour_is_hardly_read(impl, device):
    """-100, and not -∞: with a bias of +200 on everything else's key, the wrapped tokens are read."""
    q, v = torch.zeros(1, 2, 2, 1, 1, device=device), torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    bias = torch.zeros(1, 4, 4, device=device)
    alone = window_attention(q, q, v.view(q.shape), bias, 2, shift=1, impl=impl)
    assert alone.flatten().tolist() == [1, 2, 3, 4]
    # The one window of the shifted map holds the four tokens in the order 4 3 2 1.
    bias[0, :, 3] = 200
    wrapped = window_attention(q, q, v.view(q.shape), bias, 2, shift=1, impl=impl)
    assert wrapped.flatten().tolist() == [1, 1, 1, 1]


# --- what is not finite ----------------------------------------------------------------------------------------------


#: Triton's interpreter tries only these.
FEW = {"q": math.nan, "k": math.inf, "bias": -math.inf, "pad_value": math.nan}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", *PADS])
@SHIFTED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, name, bad: case == "to fill both" and str(FEW.get(name)) == str(bad))
def test_not_finite(impl, case, name, bad, device):
    """Is NaN where it is read, and nothing elsewhere."""
    call = make(*CASES[case], device=device)
    call.tensors[name][(1, 2, 4, 1, 2)[: call.tensors[name].dim()]] = bad
    if name == "bias" and bad == -math.inf:
        if impl == "composed":
            pytest.skip("to torch's attention a query that reads nothing is zeros")
        call.tensors[name][1, 3] = bad
    checks.assert_not_finite_as_reference(call, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHIFTED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: dtype == torch.float32 and case == "to fill both")
def test_bias_of_infinity(impl, case, dtype, device, tolerances):
    """A bias of −∞ must exclude these tokens."""
    call = make(*CASES[case], dtype=dtype, device=device)
    call.tensors["bias"][1, :, 1:4] = -math.inf
    assert_as_good_as_eager(call, impl, tolerances[dtype])


# --- strides ---------------------------------------------------------------------------------------------------------


@SHIFTED
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout, case: layout == "NCHW" and case == "to fill both")
def test_any_strides(impl, layout, case, device, tolerances):
    call = make(*CASES[case], device=device)
    call = call.having(**{name: calls.laid_out(tensor, LAYOUTS[layout]) for name, tensor in call.tensors.items()})
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thirds_of_one_projection(impl, device, tolerances):
    """q, k and v as the model's one linear layer gives them, and one bias for all heads: no copies."""
    call = make(*CASES["to fill both"], device=device)
    thirds = torch.cat([call.tensors[name].flatten(3) for name in "qkv"], dim=3).chunk(3, dim=3)
    call = call.having(**{name: third.unflatten(3, (2, 16)) for name, third in zip("qkv", thirds, strict=True)})
    call = call.having(bias=call.tensors["bias"][:1].expand(2, -1, -1))
    assert not any(call.tensors[name].is_contiguous() for name in ("q", "k", "v", "bias"))
    assert_as_good_as_eager(call, impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_map_of_one_column(impl, device, tolerances):
    """That was a row: as contiguous as any, with a stride from column to column that leads out of it."""
    call = make(2, 7, 1, 2, 5, 3, 1, device=device)
    rows = {n: call.tensors[n].transpose(1, 2).clone(memory_format=torch.contiguous_format) for n in "qkv"}
    turned = {name: row.transpose(1, 2) for name, row in rows.items()}
    assert turned["q"].is_contiguous()
    assert turned["q"].stride(2) == 7 * turned["q"].stride(1)
    assert_as_good_as_eager(call.having(**turned), impl, tolerances[torch.float32])


# --- what others compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 10), (3, 2), (4, 7)], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda size, shift: shift == 2 and size == (4, 7))
@NOT_OF_64_BITS
def test_in_place_of_transformers_own(impl, size, shift, dtype, device):
    """The layer's output and all inputs' gradients must be those of transformers' layer, between its linear layers."""
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    torch.manual_seed(0)
    config = swin.SwinConfig(
        embed_dim=24, window_size=4, attn_implementation="sdpa"
    )  # "eager" rounds its softmax to float32
    layer = swin.SwinLayer(config, 24, size, num_heads=3, shift_size=shift).to(device, dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    (height, width), attention = size, layer.attention
    x = normal(2, height * width, 24, dtype=dtype, device=device).requires_grad_()

    def ours() -> Tensor:
        tokens = layer.layernorm_before(x).unflatten(1, size)
        q, k, v = (f(tokens).unflatten(3, (3, 8)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        pads = {"pad_key": attention.k_proj.bias.view(3, 8), "pad_value": attention.v_proj.bias.view(3, 8)}
        out = window_attention(q, k, v, attention.relative_position_bias()[0], 4, shift=shift, **pads, impl=impl)
        y = x + attention.o_proj(out).flatten(1, 2)
        return y + layer.mlp(layer.layernorm_after(y))

    def theirs() -> Tensor:
        return layer(x, size, always_partition=True)[0]

    dout = normal(2, height * width, 24, seed=1, dtype=dtype, device=device)
    leaves = [x, *layer.parameters()]
    found = [[y.detach(), *torch.autograd.grad(y, leaves, dout)] for y in (ours(), theirs())]
    for got, want in zip(*found, strict=True):
        # The keys' bias, by which all scores of a query shift, has no gradient: an error counts at the output's size.
        size = max(torch.linalg.vector_norm(tensor) for tensor in (want, found[1][0]))
        assert torch.linalg.vector_norm(got - want) <= (1e-5 if dtype == torch.float32 else 1e-13) * size
