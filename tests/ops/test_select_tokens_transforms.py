"""select_tokens under autograd, torch.library, torch.compile and torch.vmap; and the same bits again."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, runs
from left_out import light
from select_inputs import CASES, LARGE, cosines, make


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 40, 5, 18, 50, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl)


@pytest.mark.parametrize("case", ["C 21", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(2, 6, 3, 4, 7, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_finite_differences(impl, device):
    checks.assert_slope(make(2, 40, 5, 18, 70, device=device), impl)


@pytest.mark.parametrize("needs", ["tokens", "classes"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_one_gradient(impl, needs, device):
    """The presence alone has a gradient here."""
    call = make(2, 40, 5, 18, 70, device=device)
    slopes = []
    for name in ("reference", impl):
        leaf = call.tensors[needs].clone().requires_grad_()
        presence = call.having(**{needs: leaf}).outputs(name)["presence"]
        slopes += torch.autograd.grad(presence.square().sum(), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(1, 6, 3, 4, 7, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_autocast_rounds_no_cosine(impl, device):
    """Tensors of two dtypes are taken in the wider one."""
    call = make(2, 40, 5, 18, 70, device=device)
    want = call.outputs(impl)
    half = call.tensors["tokens"].bfloat16()
    wide = call.having(tokens=half.float()).outputs(impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        checks.assert_bitwise(call.outputs(impl), want)
        checks.assert_bitwise(call.having(tokens=half).outputs(impl), wide)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 5, 9, 30, device=device), impl)


@pytest.mark.parametrize("mapped", [("tokens", "classes"), ("tokens",), ("classes",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    call = make(2, 6, 3, 5, 12, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck(impl, device):
    """And what is saved for the backward pass is what the schema says."""
    for shape in ((2, 40, 5, 18, 70), (0, 5, 3, 4, 9), (1, 0, 2, 3, 5)):
        tokens, classes = make(*shape, device=device).tensors.values()
        cosine = cosines(tokens, classes)
        want, place = cosine.max(dim=2)
        bits = (cosine >= 0.1).int() << torch.arange(shape[2], device=device)
        for best_only in (False, True):
            found = checks.opcheck("select_tokens", impl, tokens, classes, 0.1, shape[-1], best_only)
            selected, counts, presence, *saved = found
            support, best, above = saved
            assert torch.equal(best, place.where(want >= 0.1, -1).int())
            assert torch.equal(support, counts if best_only else (cosine >= 0.1).sum(1))
            assert torch.equal(above, best.new_empty(*best.shape, 0) if best_only else bits.sum(2, keepdim=True).int())
            gradients = (torch.ones_like(selected), torch.ones_like(presence))
            checks.opcheck("select_tokens_backward", impl, *gradients, tokens, classes, *saved)
