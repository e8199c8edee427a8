"""window_attention under autograd, torch.library, torch.compile and torch.vmap; and the same bits again."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, runs
from left_out import light
from window_inputs import CASES, LARGE, PADS, TENSORS, make

SMALL = (2, 2, 3, 2, 3, 2, 1)
SMALLEST = (2, 1, 2, 2, 3, 2, 1)  # one window, of which half is filled up
PADDED = pytest.mark.parametrize("pads", [(), PADS], ids=["zeros", "pads"])


@pytest.mark.parametrize("case", ["window 2", "to fill both", "of one row"])
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda case: case == "of one row")
def test_reproducible_and_of_its_image_alone(impl, case, device):
    """The gradients of bias and padding are sums over the batch."""
    _, *shape = CASES[case]
    call = make(3, *shape, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=("bias", *PADS))


@pytest.mark.parametrize("case", ["to fill both", "smaller than the window", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@PADDED
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, shift, pads, device):
    checks.gradcheck(make(*SMALL[:-1], shift, pads=pads, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("case", ["to fill both", "smaller than the window", "window 2"])
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda case: case == "smaller than the window")
def test_finite_differences(impl, case, device):
    call = make(*CASES[case], device=device)
    if case == "window 2":  # nothing to fill up, and so no gradient
        call = make(*CASES[case], pads=(), device=device)
    checks.assert_slope(call, impl)


@pytest.mark.parametrize("needs", [*((name,) for name in TENSORS), ("q", "k", "v"), ("bias", *PADS)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda needs: needs in (("bias",), ("pad_key",), ("q", "k", "v")))
def test_gradients_of_some(impl, needs, device):
    """The others are given and need none: the bias of a frozen model."""
    call = make(*SMALL, device=device)
    slopes = []
    for name in ("reference", impl):
        leaves = {name: call.tensors[name].clone().requires_grad_() for name in needs}
        slopes.append(torch.autograd.grad(call.having(**leaves)(name)[0].square().sum(), [*leaves.values()]))
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@PADDED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda pads: bool(pads))
def test_second_derivatives(impl, pads, device):
    call = make(*SMALL, pads=pads, device=device)
    checks.assert_once_differentiable(call, impl)


@PADDED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda pads: bool(pads))
def test_autocast(impl, pads, device):
    call = make(*SMALL, pads=pads, device=device)
    checks.assert_autocasts(call, impl, device)


@PADDED
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda shift, pads: bool(pads) and bool(shift))
def test_compile_without_graph_breaks(impl, shift, pads, device):
    call = make(*SMALL[:-1], shift, pads=pads, device=device)
    checks.assert_compiles(call, impl)


@pytest.mark.parametrize(
    "mapped",
    [TENSORS, ("q", "k", "v", *PADS), ("q", "k", "v"), ("q",), ("bias",), PADS, ("v", "bias"), ("k", "pad_value")],
    ids=" ".join,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: mapped in (PADS, ("v", "bias")))
def test_vmap(impl, mapped, device):
    """Over tasks: a larger batch, unless each has a bias of its own."""
    call = make(*SMALLEST, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_vmap_without_pads(impl, device):
    call = make(*SMALL, pads=(), device=device)
    checks.assert_maps(call, impl, ("q", "k", "v"))


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    """The gradient of the bias is left out where nobody needs it, and the others are the same."""
    for shape in (SMALLEST, (1, 2, 4, 1, 2, 2, 0), (0, 3, 2, 2, 4, 2, 1), (1, 0, 3, 1, 2, 2, 0)):
        call = make(*shape, device=device)
        q, k, v, bias, *pads = call.tensors.values()
        pads = [pad.expand(shape[0], -1, -1) for pad in pads]
        arguments = (q, k, v, bias, *pads, *shape[5:], shape[4] ** -0.5)
        out = checks.opcheck("window_attention", impl, *arguments)
        torch.testing.assert_close(out, call("reference")[0])
        with_bias, without = (
            checks.opcheck("window_attention_backward", impl, torch.ones_like(out), *arguments, needed)
            for needed in (True, False)
        )
        assert [grad.shape for grad in with_bias] == [x.shape for x in (q, k, v, bias, *pads)]
        assert without[3].shape == (0,)
        for i in (0, 1, 2, 4, 5):
            assert torch.equal(with_bias[i], without[i])
