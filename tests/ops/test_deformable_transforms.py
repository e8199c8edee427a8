"""deformable_attention under autograd, torch.library, torch.compile and torch.vmap; and the same bits again."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, Call, runs
from deformable import CASES, LARGE, make
from left_out import light, points

from fastcss.ops import deformable_attention

BOXES = pytest.mark.parametrize("box", [False, True], ids=["points", "boxes"])
TENSORS = ("value", "reference_points", "offsets", "logits")
SMALL = (2, ((3, 4), (2, 1)), 5, 2, 3, 2)


@BOXES
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda box: not box)
def test_reproducible_and_of_its_image_alone(impl, box, device):
    call = make(3, ((5, 7), (3, 4)), 9, 2, 10, 3, box=box, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl)


@BOXES
@pytest.mark.parametrize("case", ["D 33", *LARGE])
def test_threads_do_not_change_results(case, box):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], box=box, dtype=dtype))


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda: False)
def test_many_queries_at_one_place(impl, case, device):
    """All queries add to the gradient of the same few tokens, and must do so in the same order on any threads."""
    call = make(*LARGE[case], dtype=torch.bfloat16, device=device)
    same = {name: call.tensors[name][:, :1].expand_as(call.tensors[name]) for name in ("reference_points", "offsets")}
    call = call.having(**same)
    checks.assert_reproducible(call, impl)
    if impl == "cpu":
        checks.assert_same_on_any_number_of_threads(call)


@BOXES
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, box, device):
    checks.gradcheck(make(*SMALL, box=box, dtype=torch.float64, device=device), impl)


@BOXES
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, box, device):
    call = make(2, ((5, 7), (3, 4)), 9, 2, 18, 3, box=box, device=device)
    checks.assert_slope(call, impl)


@BOXES
@pytest.mark.parametrize("needs", TENSORS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda needs, box: box and needs in ("value", "reference_points"))
def test_one_gradient(impl, needs, box, device):
    call = make(*SMALL, box=box, device=device)
    slopes = []
    for name in ("reference", impl):
        leaf = call.tensors[needs].clone().requires_grad_()
        slopes += torch.autograd.grad(call.having(**{needs: leaf})(name)[0].square().sum(), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


@BOXES
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda box: not box)
def test_second_derivatives(impl, box, device):
    call = make(*SMALL, box=box, device=device)
    checks.assert_once_differentiable(call, impl)


@BOXES
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda box: not box)
@points(
    lambda impl, device: impl != "composed" or device != "cuda", "the gradient of grid_sample is not the same twice"
)
def test_autocast(impl, box, device):
    """Reference points have the dtype that they have."""
    call = make(*SMALL, box=box, device=device)
    points = call.tensors.pop("reference_points")
    call = Call(deformable_attention, call.tensors, call.options | {"reference_points": points})
    checks.assert_autocasts(call, impl, device)


@BOXES
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda box: not box)
def test_compile_without_graph_breaks(impl, box, device):
    call = make(*SMALL, box=box, device=device)
    checks.assert_compiles(call, impl)


@pytest.mark.parametrize("mapped", [TENSORS, TENSORS[:1], TENSORS[1:2], TENSORS[2:]], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: mapped == TENSORS)
def test_vmap(impl, mapped, device):
    """Over tasks."""
    call = make(*SMALL, box=len(mapped) == 2, device=device)
    checks.assert_maps(call, impl, mapped)


@BOXES
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda box: not box)
def test_opcheck(impl, box, device):
    """The gradient of the reference points is left out where nobody needs it, and the others are the same."""
    for shape in ((1, *SMALL[1:]), (0, ((2, 3),), 3, 2, 4, 2), (1, ((2, 3), (1, 1)), 0, 1, 2, 1)):
        call = make(*shape, box=box, device=device)
        value, points, offsets, logits = call.tensors.values()
        sizes = [size for level in shape[1] for size in level]
        out = checks.opcheck("deformable_attention", impl, value, sizes, points, offsets, logits)
        torch.testing.assert_close(out, call("reference")[0])
        arguments = (torch.ones_like(out), value, sizes, points, offsets, logits)
        with_points, without = (
            checks.opcheck("deformable_attention_backward", impl, *arguments, needed) for needed in (True, False)
        )
        assert [grad.shape for grad in with_points] == [x.shape for x in (value, points, offsets, logits)]
        assert without[1].shape == (0,)
        for i in (0, 2, 3):
            assert torch.equal(with_points[i], without[i])
