"""Tests the inputs of multi_lora: any strides and shapes, values that are not finite, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import IMPLEMENTATIONS, runs
from lora_inputs import assert_as_good_as_eager, make, output_gradient

from fastcss import PackedLora, multi_lora
from fastcss.composed import multi_lora as composed

#: Rows that are all the same all lose the same to cancellation; here no sum is less than a tenth of its terms.
SEED = 3
LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "expanded": lambda t: t[..., :1, :].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides(impl, mode, layout, device, tolerances):
    index = [1, -1, 2] if mode == "routed" else None
    inputs = make(mode, (66,), 21, 18, (3, 0, 17), index=index, device=device, seed=SEED)
    change = LAYOUTS[layout]
    strided = [change(t) for t in inputs[:4]]
    inputs = inputs._replace(**dict(zip(inputs._fields, strided, strict=False)), bias=inputs.bias[:1].expand(18))
    if index:
        inputs = inputs._replace(index=torch.stack([inputs.index] * 2, -1).to(torch.int32)[:, 0])
    dy = change(output_gradient(inputs))
    assert_as_good_as_eager(inputs, impl, tolerances[torch.float32], dy)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_inf_propagate(impl, mode, value, device):
    for rows in (4, 70):
        index = [1, -1, 0] if mode == "routed" else None
        inputs = make(mode, (rows,), 21, 18, (3, 17, 0), index=index, device=device)
        inputs.x[..., 2, 5] = value
        want, got = inputs.call("reference"), inputs.call(impl)
        assert torch.equal(want.isfinite(), got.isfinite())
        assert not got[..., 2, :].isfinite().any()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-2, 2, 2**40])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_index_out_of_range_raises_on_cpu(impl, wrong):
    inputs = make("routed", (3,), 7, 5, (2, 3), index=[0, wrong])
    with pytest.raises(IndexError, match="index"):
        inputs.call(impl)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("wrong", [-2, 2, 2**40])
def test_index_out_of_range_gives_nan_where_it_cannot_be_read(rows, wrong, device):
    runs("triton", device)
    inputs = make("routed", (rows,), 7, 5, (2, 3), index=[1, wrong, -1], device=device)
    tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
    y, h = torch.ops.fastcss.multi_lora.triton(inputs.x, inputs.weight, inputs.bias, *tensors, 3, True)
    right = inputs._replace(index=inputs.index.clamp(-1, 1)).call("reference")
    torch.testing.assert_close(y[[0, 2]], right[[0, 2]])
    assert y[1].isnan().all()

    dx, da, db = torch.ops.fastcss.multi_lora_backward.triton(
        torch.ones_like(y), inputs.x, inputs.weight, *tensors, h, 3, True, True
    )
    assert dx[1].isnan().all()
    for gradient in (dx[[0, 2]], da, db):  # the wrong slot belongs to no adapter
        assert gradient.isfinite().all()
    torch.testing.assert_close(da[2:], inputs.lora.scales[1] * (inputs.b[2:].sum(1)[:, None] * inputs.x[0].sum(0)))


@pytest.mark.parametrize("wrong", [-2, 2])
def test_index_out_of_range_beneath_the_public_function(wrong):
    """The kernel reads the index itself, and looks at it; the composed form, which may not read it, gives NaN."""
    inputs = make("routed", (3,), 7, 5, (2, 3), index=[1, wrong, -1])
    y = composed.multi_lora(inputs.x, inputs.weight, inputs.bias, inputs.lora, inputs.index)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
    kernel = getattr(torch.ops.fastcss.multi_lora, runs("cpu", "cpu"))
    with pytest.raises(RuntimeError, match=rf"multi_lora: index must be in \[-1, 2\), got {wrong}"):
        kernel(inputs.x, inputs.weight, inputs.bias, *tensors, 3, False)


def _bad_arguments():
    def swap(**changes):
        return lambda arguments: arguments.update(changes)

    def swap_lora(**changes):
        return lambda arguments: arguments.update(lora=dataclasses.replace(arguments["lora"], **changes))

    half, meta = torch.float16, torch.device("meta")
    return {
        "mode": (swap(mode="every"), ValueError, "mode must be one of .* got 'every'"),
        "lora type": (swap(lora=[torch.ones(2, 7)]), TypeError, "lora must be a PackedLora"),
        "x columns": (swap(x=torch.ones(4, 6)), ValueError, r"x must be .* got \[4, 6\] and \[5, 7\]"),
        "x dimensions": (swap(x=torch.tensor(1.0)), ValueError, r"x must be .* got \[\]"),
        "x dtype": (swap(x=torch.ones(4, 7, dtype=torch.int64)), TypeError, "x must be a floating-point tensor"),
        "x tasks": (swap(mode="diverged", x=torch.ones(3, 4, 7)), ValueError, r"x must be \[T, \*, K\] with T = 2"),
        "weight dimensions": (swap(weight=torch.ones(7)), ValueError, r"weight \[N, K\], got .* \[7\]"),
        "weight dtype": (swap(weight=torch.ones(5, 7, dtype=half)), TypeError, "weight must have the dtype of x"),
        "weight device": (swap(weight=torch.ones(5, 7, device=meta)), ValueError, "weight must be on the device of x"),
        "bias shape": (swap(bias=torch.ones(4)), ValueError, r"bias must be \[N\] = \[5\], got \[4\]"),
        "bias dtype": (swap(bias=torch.ones(5, dtype=half)), TypeError, "bias must have the dtype of x"),
        "lora.a shape": (swap_lora(a=torch.ones(4, 8)), ValueError, r"lora must fit weight .* got \[4, 8\]"),
        "lora.b shape": (swap_lora(b=torch.ones(4, 6)), ValueError, r"lora must fit weight .* \[4, 6\]"),
        "lora.a dtype": (swap_lora(a=torch.ones(4, 7, dtype=half)), TypeError, "lora.a must be torch.float32"),
        "lora.b dtype": (swap_lora(b=torch.ones(4, 5, dtype=half)), TypeError, "lora.b must be torch.float32"),
        "lora device": (swap_lora(b=torch.ones(4, 5, device=meta)), ValueError, "lora.b must be on the device of x"),
        "index missing": (swap(mode="routed", x=torch.ones(3, 4, 7)), ValueError, "index goes with mode 'routed'"),
        "index too much": (swap(index=torch.zeros(4, dtype=torch.int64)), ValueError, "index goes with mode 'routed'"),
        "index shape": (
            swap(mode="routed", x=torch.ones(3, 4, 7), index=torch.zeros(4, dtype=torch.int64)),
            ValueError,
            r"index must be int32 or int64 \[S\] = \[3\], got torch.int64 \[4\]",
        ),
        "index dtype": (
            swap(mode="routed", x=torch.ones(3, 4, 7), index=torch.zeros(3)),
            ValueError,
            "index must be int32 or int64 .* got torch.float32",
        ),
        "impl": (swap(impl="fortran"), ValueError, "impl must be 'auto' or one of .* got 'fortran'"),
    }


@pytest.mark.parametrize("name", _bad_arguments())
def test_bad_arguments_are_named(name):
    change, kind, message = _bad_arguments()[name]
    lora = PackedLora.pack([torch.ones(2, 7)] * 2, [torch.ones(5, 2)] * 2, [1.0, 1.0])
    arguments = {"x": torch.ones(4, 7), "weight": torch.ones(5, 7), "lora": lora}
    change(arguments)
    with pytest.raises(kind, match=f"^multi_lora: .*{message}"):
        multi_lora(**arguments)


@pytest.mark.parametrize(
    ("a", "b", "scales", "message"),
    [
        ([], [], [], "at least one; got 0, 0, 0"),
        ([torch.ones(2, 7)], [torch.ones(5, 2)], [1.0, 2.0], "as many lora_a as lora_b and scales.*got 1, 1, 2"),
        ([torch.ones(2, 7), torch.ones(2, 6)], [torch.ones(5, 2)] * 2, [1.0] * 2, r"adapter 1: .*got \[2, 6\]"),
        ([torch.ones(2, 7)] * 2, [torch.ones(5, 2), torch.ones(5, 3)], [1.0] * 2, r"adapter 1: .* and \[5, 3\]"),
    ],
)
def test_adapters_that_do_not_fit_are_not_packed(a, b, scales, message):
    with pytest.raises(ValueError, match=f"^PackedLora.pack: .*{message}"):
        PackedLora.pack(a, b, scales)


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
def test_an_explicit_implementation_never_falls_back(impl):
    inputs = make("shared", (3,), 7, 5, (2,), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"multi_lora: impl='{impl}' cannot run: "):
        inputs.call(impl)
    assert torch.equal(inputs.call("auto"), inputs.call("composed"))
