"""bi_attention under autograd, torch.library, torch.compile and torch.vmap; and the same bits again."""

from __future__ import annotations

import math

import checks
import pytest
import torch
from bi_inputs import CASES, LARGE, MASKS, TENSORS, make, make_far
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, normal, runs
from left_out import light

SMALL = (2, 5, 4, 2, 3)
MASKED = pytest.mark.parametrize("masks", [(), MASKS], ids=["all read", "masks"])


@MASKED
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda masks: masks == MASKS)
def test_reproducible(impl, masks, device):
    call = make(2, 37, 9, 2, 10, masks=masks, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda dtype: dtype == torch.float32)
def test_of_its_sample_alone(impl, dtype, device):
    """Bitwise, whichever sample has the largest logit, as long as no logit is 50,000 below it."""
    call = make(3, 13, 9, 1, 10, dtype=dtype, device=device)
    dys = call.output_gradients()
    for larger in (1, 0):
        mates = {name: tensor.clone() for name, tensor in call.tensors.items()}
        mates["q"][larger] *= 20
        call = call.having(**mates)
        together = call.leaves().results(impl, dys)
        for i in range(3):
            parts = {name: value[i : i + 1] for name, value in (call.tensors | call.options).items()}
            alone = call.having(**parts).leaves().results(impl, tuple(dy[i : i + 1] for dy in dys))
            checks.assert_bitwise(alone, {name: value[i : i + 1] for name, value in together.items()})


@pytest.mark.parametrize("case", ["D 17", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@MASKED
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, masks, device):
    checks.gradcheck(make(*SMALL, masks=masks, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("masks", [*((name,) for name in MASKS), MASKS], ids=" ".join)
@pytest.mark.parametrize("impl", COMPILED)
@light(lambda masks: masks == MASKS)
def test_finite_differences(impl, masks, device):
    call = make(2, 37, 9, 2, 18, masks=masks, device=device)
    checks.assert_slope(call, impl)


@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences_at_the_floor(impl, device):
    """The peak belongs to another sample, so that the differences do not move it."""
    call = make_far("some of another sample", device=device)
    dys = call.output_gradients()
    got = call.leaves().results(impl, dys)
    wide = call.leaves(torch.float64)
    with torch.no_grad():
        for seed, (name, value) in enumerate(wide.tensors.items()):
            direction = normal(*value.shape, seed=50 + seed, dtype=torch.float64, device=device)
            direction[0] = 0
            up, down = (wide.having(**{name: value + step * direction})("reference") for step in (1e-5, -1e-5))
            slope = sum(((a - b) * dy).sum() for a, b, dy in zip(up, down, dys, strict=True)) / 2e-5
            found = (got[f"d{name}"].double() * direction).sum()
            assert slope != 0
            assert abs(found - slope) <= 1e-4 * torch.linalg.vector_norm(got[f"d{name}"].double()), name


@pytest.mark.parametrize("needs", TENSORS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda needs: needs in ("q", "v_text"))
def test_one_gradient(impl, needs, device):
    call = make(*SMALL, device=device)
    slopes = []
    for name in ("reference", impl):
        leaf = call.tensors[needs].clone().requires_grad_()
        outputs = call.having(**{needs: leaf})(name)
        slopes += torch.autograd.grad(sum(y.square().sum() for y in outputs), leaf)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [0, 1], ids=["image", "text"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda side: side == 1)
def test_gradient_of_one_side(impl, side, device):
    """The other has none, and what only that side reads has zeros."""
    call = make(*SMALL, device=device)
    slopes = []
    for name in ("reference", impl):
        leaves = call.leaves()
        loss = leaves(name)[side].square().sum()
        slopes.append(torch.autograd.grad(loss, [*leaves.tensors.values()], materialize_grads=True))
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not slopes[1][2 + side].count_nonzero()


@MASKED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda masks: masks == MASKS)
def test_second_derivatives(impl, masks, device):
    call = make(*SMALL, masks=masks, device=device)
    checks.assert_once_differentiable(call, impl)


@MASKED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda masks: masks == MASKS)
def test_autocast(impl, masks, device):
    call = make(*SMALL, masks=masks, device=device)
    checks.assert_autocasts(call, impl, device)


@MASKED
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda masks: masks == MASKS)
def test_compile_without_graph_breaks(impl, masks, device):
    call = make(*SMALL, masks=masks, device=device)
    checks.assert_compiles(call, impl)


@pytest.mark.parametrize(
    "mapped",
    [(*TENSORS, *MASKS), TENSORS, ("q", "v_image"), ("k", "v_text", "text_mask"), ("q",), MASKS[1:]],
    ids=" ".join,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) == 3)
def test_vmap(impl, mapped, device):
    """Over tasks."""
    call = make(*SMALL, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("masks", [(), *((name,) for name in MASKS)], ids=["all read", *MASKS])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_vmap_with_masks_that_are_not_there(impl, masks, device):
    call = make(*SMALL, masks=masks, device=device)
    checks.assert_maps(call, impl, (*TENSORS, *masks))


@pytest.mark.parametrize("case", ["some of another sample", "some entries of a row"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda: False)
def test_each_task_has_its_own_peak(impl, case, device):
    """Task 1 is far below task 0, which must not floor it; within a task all samples have one peak."""
    call = make_far(case, device=device)
    tensors = {name: torch.stack([tensor, tensor]) for name, tensor in call.tensors.items()}
    # Channels that are zero in the queries of task 0: all logits of task 1 are lower by as much.
    tensors["q"], tensors["k"] = (torch.cat([tensors[n], torch.zeros_like(tensors[n])], dim=-1) for n in "qk")
    tensors["q"][1, ..., -1], tensors["k"][..., -1] = 256, -1024
    for name in ("v_image", "v_text"):
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=-1)

    def run(*tensors):
        leaves = call.having(**dict(zip(TENSORS, tensors, strict=True)), scale=0.25)
        return leaves(impl)

    def loss(*tensors):
        return sum(y.square().sum() for y in run(*tensors))

    want = [torch.stack(parts) for parts in zip(*(run(*(t[i] for t in tensors.values())) for i in (0, 1)), strict=True)]
    grads = [torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(t[i] for t in tensors.values())) for i in (0, 1)]
    want += [torch.stack(parts) for parts in zip(*grads, strict=True)]
    got = [*torch.vmap(run)(*tensors.values())]
    got += torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*tensors.values())
    torch.testing.assert_close(want[0][0], want[0][1])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    """The raw ops, and the statistics that one leaves to the other."""
    for shape, masks in ((SMALL, MASKS), ((1, *SMALL[1:]), ()), ((0, 3, 2, 2, 4), ()), ((2, 0, 3, 1, 2), MASKS)):
        call = make(*shape, masks=masks, device=device)
        unread = [call.options.get(name) for name in MASKS]
        scale = shape[4] ** -0.5
        arguments = (*call.tensors.values(), *unread, scale)
        image, text, *statistics = checks.opcheck("bi_attention", impl, *arguments, shape[0])
        for got, want in zip((image, text), call("reference"), strict=True):
            torch.testing.assert_close(got, want)
        dys = call.output_gradients()
        grads = checks.opcheck("bi_attention_backward", impl, *dys, *arguments[:-1], text, *statistics, scale)
        wanted = call.leaves().results("reference", dys)
        for name, got in zip(TENSORS, grads, strict=True):
            torch.testing.assert_close(got, wanted[f"d{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("impl", COMPILED)
def test_statistics(impl, group, device):
    """No floor where logits are near each other, and of each softmax the largest logit and the logarithm of the sum."""
    call = make(4, 7, 5, 2, 3, masks=(), device=device)
    q, k, *values = call.tensors.values()
    *_, image, text, floor = checks.raw("bi_attention", impl)(q, k, *values, None, None, 1.0, group)
    logits = torch.einsum("bnhd,blhd->bhnl", q, k)
    for got, dim in ((image, 3), (text, 2)):
        torch.testing.assert_close(got[..., 0], logits.amax(dim))
        torch.testing.assert_close(got[..., 1], (logits - logits.amax(dim, keepdim=True)).logsumexp(dim))
    assert floor.tolist() == [[0, -math.inf]] * 4
    *_, floor = checks.raw("bi_attention", impl)(1e3 * q, 1e3 * k, *values, None, None, 1.0, group)
    peaks = 1e6 * logits.unflatten(0, (-1, group)).amax(dim=(1, 2, 3, 4)).repeat_interleave(group)
    torch.testing.assert_close(floor, torch.stack([peaks, torch.full_like(peaks, -50000)], dim=1))
