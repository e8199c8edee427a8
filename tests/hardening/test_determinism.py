"""The same bits on any number of threads: what the ops' own tests ask of some shapes, of random ones."""

from __future__ import annotations

import checks
import pytest
from calls import DTYPES, Call, runs
from hypothesis import given
from hypothesis import strategies as st
from op_calls import OPS, lora, make_lora
from test_fuzz import draw_call

from fastcss import ops
from fastcss.composed.class_affinity import centers_first


def assert_same_bits(call: Call) -> None:
    """But for products of torch's own, as docs/numerics.md lists them: MKL sums in another order on more threads."""
    tensors = dict(call.tensors)
    if call.op is ops.class_affinity and not centers_first(tensors["feats"], tensors["centers"]):
        return
    weight = {"weight": tensors.pop("weight")} if call.op is lora else {}
    checks.assert_same_on_any_number_of_threads(Call(call.op, tensors, call.options | weight))


@pytest.mark.parametrize("op", OPS)
def test_any_shape_on_any_number_of_threads(op, fuzz):
    runs("cpu", "cpu")

    @fuzz(1 / 4)
    @given(st.data())
    def check(data):
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        assert_same_bits(draw_call(data, op, "cpu", dtype, "cpu"))

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[40], [3, 130]], ids=str)
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
def test_multi_lora(mode, rows, dtype):
    runs("cpu", "cpu")
    assert_same_bits(make_lora(mode, rows, 130, 70, [32, 0, 5, 17], dtype=dtype))
