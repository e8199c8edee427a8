"""prompt_mlp: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import math

import calls
import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, Call, normal, runs
from left_out import light
from torch import Tensor

from fastcss.ops import prompt_mlp

WEIGHTS = ("w1", "b1", "w2", "b2")


def make(rows, classes, inputs, hidden, outputs, *, index=None, dtype=torch.float32, device="cpu", seed=0) -> Call:
    """Hidden values of standard deviation 1, some below 0 but none so near that a rounding would switch it; rows of the
    same class, in no order, and one in six of none."""
    shapes = (
        (rows, inputs),
        (classes, inputs, hidden),
        (classes, hidden),
        (classes, hidden, outputs),
        (classes, outputs),
    )
    scales = (1, 1 / math.sqrt(max(inputs, 1)), 0.5, 1 / math.sqrt(max(hidden, 1)), 0.5)
    tensors = [
        (normal(*shape, seed=seed + i) * s).to(dtype) for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]
    if index is None:
        index = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
        index[torch.arange(rows) % 6 == 5] = -1
    _clear(*tensors[:3], index, {torch.float32: 1e-4, torch.float64: 1e-4}.get(dtype, 1e-2))
    names = ("z", *WEIGHTS)
    return Call(prompt_mlp, dict(zip(names, (t.to(device) for t in tensors), strict=True)), {"index": index.to(device)})


def _clear(z: Tensor, w1: Tensor, b1: Tensor, index: Tensor, margin: float) -> None:
    """Moves the bias of a hidden unit that is within ``margin`` of its bend for any row."""
    for c in set(index.tolist()) - {-1}:
        for _ in range(100):
            near = (z[index == c].double() @ w1[c].double() + b1[c].double()).abs().lt(margin).any(0)
            b1[c] += near * 2 * margin


CASES = {  # R, K, L, H, O
    "one element": (1, 1, 1, 1, 1),
    "no rows": (0, 3, 5, 4, 6),
    "no inputs": (3, 3, 0, 4, 6),
    "no hidden": (3, 3, 5, 0, 6),
    "no outputs": (3, 3, 5, 4, 0),
    "one class": (7, 1, 33, 65, 21),
    "a row each": (5, 40, 33, 21, 65),
    "R 20": (20, 5, 65, 33, 97),
    "R 70": (70, 3, 21, 33, 18),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"L 530": (9, 4, 530, 130, 150), "O 1030": (20, 3, 70, 257, 1030), "R 300": (300, 2, 40, 70, 66)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(
    lambda case, dtype: (
        (case, dtype) == ("R 20", torch.bfloat16) or (dtype == torch.float32 and case not in (*LARGE, "R 20", "R 70"))
    )
)
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    calls.assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_by_hand(impl, device):
    """Class 1 adds what of z is above 2, class 0 takes its second half; none is nothing."""
    z = torch.tensor([[1.0, 5.0], [1.0, 5.0], [4.0, 3.0]], device=device)
    w1 = torch.tensor([[[0.0], [1.0]], [[1.0], [1.0]]], device=device)
    b1, w2 = torch.tensor([[0.0], [-2.0]], device=device), torch.tensor([[[1.0, 0.0]], [[1.0, -1.0]]], device=device)
    b2 = torch.tensor([[0.0, 7.0], [0.5, 0.0]], device=device)
    y = prompt_mlp(z, w1, b1, w2, b2, torch.tensor([1, -1, 0], device=device), impl=impl)
    assert y.tolist() == [[4.5, -4], [0, 0], [3, 7]]
    y = prompt_mlp(-z, w1, b1, w2, b2, torch.tensor([1, 0, 0], device=device), impl=impl)
    assert y.tolist() == [[0.5, 0], [0, 7], [0, 7]]


# --- index -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_rows_of_no_class(impl, device):
    """Zeros, and zero gradients, whatever their z is; and so for the weights of classes without rows."""
    call = make(12, 7, 18, 21, 9, index=torch.tensor([-1, 3, 3, -1, 0, 5, 3, -1, 0, -1, -1, 6]), device=device)
    none = call.options["index"] < 0
    dys = call.output_gradients()
    want = call.leaves().results(impl, dys)
    call.tensors["z"][none] = math.nan
    got = call.leaves().results(impl, dys)
    for name in ("prompt_mlp", "dz"):
        assert not got[name][none].count_nonzero(), name
        assert torch.equal(got[name][~none], want[name][~none]), name
    for name in (f"d{w}" for w in WEIGHTS):
        assert torch.equal(got[name], want[name]), name
        assert not got[name][[1, 2, 4]].count_nonzero(), name
    nobody = call.having(index=torch.full_like(call.options["index"], -1)).leaves()
    assert not any(t.count_nonzero() for t in nobody.results(impl, dys).values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_index_of_any_integers(impl, dtype, device):
    index = torch.tensor([3, 0, 3, 1, 6, 6, 0])
    call = make(7, 7, 18, 21, 9, index=index, device=device)
    (want,) = call(impl)
    for given in (index.to(dtype), torch.stack([index, index], 1).to(dtype)[:, 0]):
        assert torch.equal(call.having(index=given.to(device))(impl)[0], want)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_a_class_out_of_range_gives_nan(impl, device):
    """If the host cannot read the index before, that row must be NaN, and no other. The CPU's kernel reads and refuses
    it."""
    call = make(7, 5, 18, 21, 9, index=torch.tensor([3, 0, 3, 1, 4, 4, 0]), device=device)
    (want,) = call(impl)
    index = call.options["index"].clone()
    wrong = torch.tensor([1, 3, 6], device=device)
    index[wrong] = torch.tensor([5, 2**40, -2], device=device)
    if impl == "cpu":
        with pytest.raises(RuntimeError, match="prompt_mlp: index must be at least -1 and below K = 5, got 5"):
            checks.raw("prompt_mlp", impl)(*call.tensors.values(), index)
        return
    y, _ = checks.raw("prompt_mlp", impl)(*call.tensors.values(), index)
    assert torch.equal(y.isnan().any(1).nonzero()[:, 0], wrong)
    assert torch.equal(y[[0, 2, 4, 5]], want[[0, 2, 4, 5]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["z", *WEIGHTS])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda name: name in ("z", "w1"))
def test_nan_and_inf_propagate(impl, name, value, device):
    """Through the rectifier, too; and never into a row of another class."""
    call = make(7, 5, 9, 5, 4, index=torch.tensor([3, 1, 3, 1, 4, -1, 0]), device=device)
    call.tensors[name][1, ..., 2] = value
    want, got = call("reference")[0], call(impl)[0]
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got.isnan(), want.isnan())
    assert want[[0, 2, 4, 5, 6]].isfinite().all()
    assert not want.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_the_gradient_of_a_hidden_value_that_is_nan(impl, device):
    """Goes through the rectifier, as in torch."""
    call = make(7, 2, 9, 5, 4, device=device)
    call.tensors["b1"][:, 3] = math.nan
    dys = call.output_gradients()
    want, got = (call.leaves().results(name, dys) for name in ("reference", impl))
    torch.testing.assert_close(got["dz"], want["dz"])
    torch.testing.assert_close(got["db1"], want["db1"])


# --- strides ---------------------------------------------------------------------------------------------------------

#: Weights as they lie in a larger tensor, or class by class in a checkpoint.
VIEWS = {
    "every second class": lambda w: torch.stack([w, w], 1)[:, 0],
    "classes inside": lambda w: w.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda w: w.mT.contiguous().mT if w.dim() == 3 else w,
    "one class for all": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda layout: layout in ("NCHW", "a slice", "every second class", "transposed"))
def test_any_strides(impl, layout, device, tolerances):
    call = make(20, 5, 18, 21, 34, device=device)
    (dy,) = call.output_gradients()
    change = (LAYOUTS | VIEWS)[layout]
    changed = {name: change(tensor) for name, tensor in call.tensors.items() if name != "z" or layout in LAYOUTS}
    dy = change(dy) if layout in LAYOUTS else dy
    call = call.having(**changed)
    if layout in ("expanded batch", "expanded rows", "one class for all"):  # these change the values
        bias = changed["b1"].cpu().clone()
        _clear(call.tensors["z"].cpu(), changed["w1"].cpu(), bias, call.options["index"].cpu(), 1e-4)
        call = call.having(b1=bias.to(device))
    calls.assert_as_good_as_eager(call, impl, tolerances[torch.float32], gradients=(dy,))


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5, 33, 21, 65), (40, 2, 70, 130, 34)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", COMPILED_CUDA)
@light(lambda shape: shape[0] == 12)
def test_reproducible_and_of_its_row_alone(impl, dtype, shape, device):
    """A row gives the same bits alone, and in any order among others."""
    call = make(*shape, dtype=dtype, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=WEIGHTS)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0)).to(device)
    turned = call.having(z=call.tensors["z"][order], index=call.options["index"][order])
    assert torch.equal(turned(impl)[0], call(impl)[0][order])


@pytest.mark.parametrize("case", ["R 20", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


# --- autograd, torch.library, torch.compile, torch.vmap --------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, device):
    checks.gradcheck(make(6, 3, 4, 5, 3, dtype=torch.float64, device=device), impl)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_finite_differences(impl, device):
    checks.assert_slope(make(12, 5, 18, 21, 9, device=device), impl)


@pytest.mark.parametrize("needs", ["z", *WEIGHTS])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_one_gradient(impl, needs, device):
    call = make(12, 5, 18, 21, 9, device=device)
    leaf = call.tensors[needs].clone().requires_grad_()
    (y,) = call.having(**{needs: leaf})(impl)
    (dy,) = call.output_gradients()
    want = call.leaves().results("reference", (dy,))[f"d{needs}"]
    torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_second_derivatives(impl, device):
    checks.assert_once_differentiable(make(5, 3, 4, 5, 3, device=device), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_autocast(impl, device):
    checks.assert_autocasts(make(12, 5, 18, 21, 9, device=device), impl, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(7, 3, 9, 5, 4, device=device), impl)


@pytest.mark.parametrize("mapped", [("z", "index"), ("z", *WEIGHTS), ("z",), ("index",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda mapped: len(mapped) > 2)
def test_vmap(impl, mapped, device):
    call = make(6, 3, 4, 5, 3, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck(impl, device):
    for shape in ((7, 3, 9, 5, 4), (0, 2, 3, 4, 5)):
        call = make(*shape, device=device)
        (z, w1, b1, w2, b2), index = call.tensors.values(), call.options["index"]
        y, hidden = checks.opcheck("prompt_mlp", impl, z, w1, b1, w2, b2, index)
        for needs in ((True, True), (True, False), (False, True)):
            checks.opcheck("prompt_mlp_backward", impl, torch.ones_like(y), z, w1, w2, index, hidden, *needs)
