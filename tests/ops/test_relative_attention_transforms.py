"""relative_attention under autograd, torch.library, torch.compile and torch.vmap; and the same bits again."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, runs
from left_out import light
from relative_inputs import CASES, LARGE, PADS, TABLES, TENSORS, make

SMALL = (2, 2, 3, 2, 3, 2)
SMALLEST = (2, 1, 2, 2, 3, 2)  # one window, of which half is filled up
MAP = (2, 1, 2, 2, 3, None)
WINDOWED = pytest.mark.parametrize(  # the map has nothing to fill up
    ("shape", "pads"), [(SMALL, PADS), (MAP, ())], ids=["windows", "map"]
)


@pytest.mark.parametrize("case", ["map", "to fill both", "smaller than the window"])
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda case: case == "smaller than the window")
def test_reproducible_and_of_its_image_alone(impl, case, device):
    """The gradients of tables and padding are sums over the batch."""
    call = make(3, *CASES[case][1:], dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=(*TABLES, *PADS))


@pytest.mark.parametrize("case", ["to fill below", "map", *LARGE, "two parts"])
def test_threads_do_not_change_results(case):
    """A map of more than 1,024 tokens is shared out in parts, each with its own sums over the queries."""
    runs("cpu", "cpu")
    shapes = CASES | LARGE | {"two parts": (1, 33, 36, 2, 8, None)}
    for dtype in DTYPES if case in LARGE else (torch.float32,):
        checks.assert_same_on_any_number_of_threads(make(*shapes[case], dtype=dtype))


@WINDOWED
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, shape, pads, device):
    checks.gradcheck(make(*shape, pads=pads, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("case", ["to fill both", "map"])
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda case: case == "map")
def test_finite_differences(impl, case, device):
    pads = PADS if case == "to fill both" else ()  # nothing to fill up, and so no gradient
    checks.assert_slope(make(*CASES[case], pads=pads, device=device), impl)


@pytest.mark.parametrize("needs", [*((name,) for name in TENSORS), ("q", "k", "v"), (*TABLES, *PADS)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda needs: needs in (("rel_h",), ("pad_key",), ("q", "k", "v")))
def test_gradients_of_some(impl, needs, device):
    """The others are given and need none: the tables of a frozen model."""
    call = make(*SMALL, device=device)
    slopes = []
    for name in ("reference", impl):
        leaves = {name: call.tensors[name].clone().requires_grad_() for name in needs}
        slopes.append(torch.autograd.grad(call.having(**leaves)(name)[0].square().sum(), [*leaves.values()]))
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@WINDOWED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda shape: shape == MAP)
def test_second_derivatives(impl, shape, pads, device):
    checks.assert_once_differentiable(make(*shape, pads=pads, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    """One image: the padding's gradients of several are added in float32 there."""
    checks.assert_autocasts(make(1, *SMALL[1:], device=device), impl, device)


@WINDOWED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda shape: shape == SMALL)
def test_compile_without_graph_breaks(impl, shape, pads, device):
    checks.assert_compiles(make(*shape, pads=pads, device=device), impl)


@pytest.mark.parametrize(
    "mapped",
    [TENSORS, ("q", "k", "v", *PADS), ("q", "k", "v"), ("q",), ("rel_h",), PADS, ("v", "rel_w"), ("k", "pad_value")],
    ids=" ".join,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: mapped in (PADS, ("v", "rel_w")))
def test_vmap(impl, mapped, device):
    """Over tasks: a larger batch, unless each has tables of its own."""
    checks.assert_maps(make(*SMALLEST, device=device), impl, mapped)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_vmap_without_pads(impl, device):
    checks.assert_maps(make(*MAP, pads=(), device=device), impl, ("q", "k", "v"))


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    """The gradients of the tables are left out where nobody needs them, and the others are the same."""
    for shape in (SMALLEST, MAP, (0, 3, 2, 2, 4, 2), (1, 0, 3, 1, 2, None)):
        call = make(*shape, device=device)
        *tensors, pad_key, pad_value = call.tensors.values()
        tensors += [pad.expand(shape[0], -1, -1) for pad in (pad_key, pad_value)]
        settings = (shape[5] or 0, shape[4] ** -0.5)
        out, stats = checks.opcheck("relative_attention", impl, *tensors, *settings)
        torch.testing.assert_close(out, call("reference")[0])
        with_tables, without = (
            checks.opcheck(
                "relative_attention_backward", impl, torch.ones_like(out), *tensors, out, stats, *settings, needed
            )
            for needed in (True, False)
        )
        assert [grad.shape for grad in with_tables] == [x.shape for x in tensors]
        assert [grad.shape for grad in without[3:5]] == [(0,), (0,)]
        for i in (0, 1, 2, 5, 6):
            assert torch.equal(with_tables[i], without[i])
