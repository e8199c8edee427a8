"""Every op at random: any shape, dtype, strides and options, on every implementation, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, Call, laid_out
from hypothesis import given
from hypothesis import strategies as st
from left_out import points
from op_calls import OPS
from torch import Tensor

from fastcss import ops
from fastcss._dispatch import backends

pytestmark = pytest.mark.usefixtures("one_thread")

#: The share of the examples that each gets: torch's own code is not what is tested, and the interpreter is slow.
SHARES = {"cpu": 1, "cuda": 1 / 2, "composed": 1 / 4, "triton": 1 / 12}


def in_another_order(tensor: Tensor) -> Tensor:
    """The last dimension outermost."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def with_any_stride_where_it_means_nothing(tensor: Tensor) -> Tensor:
    """Along dimensions of one element, and everywhere where there is none."""
    meant = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [stride if size > 1 and tensor.numel() else 1 << 40 for size, stride in meant]
    return tensor.as_strided(tensor.shape, strides)


#: These layouts keep the values.
SAME = [
    lambda tensor: tensor,
    in_another_order,
    with_any_stride_where_it_means_nothing,
    *(change for name, change in LAYOUTS.items() if "expanded" not in name),
]


def draw_call(data: st.DataObject, op: str, impl: str, dtype: torch.dtype, device: str) -> Call:
    def size(least: int, most: int) -> st.SearchStrategy[int]:
        return st.integers(least, max(least, most // 8) if impl == "triton" else most)

    drawn = OPS[op]
    shape = data.draw(drawn.shapes(size), "shape")
    options = {name: data.draw(values, name) for name, values in drawn.options.items()}
    return drawn.make(*shape, **options, dtype=dtype, device=device, seed=data.draw(st.integers(0, 2**31), "seed"))


def draw_layouts(data: st.DataObject, layouts: list[Callable]) -> Callable[[Tensor], Tensor]:
    """Draw another layout for each tensor."""
    return lambda tensor: laid_out(tensor, data.draw(st.sampled_from(layouts), "layout")) if tensor.dim() else tensor


def test_every_op_is_here():
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert functions - {"pack_text", "scatter_cost", "filtered_argmax"} == OPS.keys() - {"packed_filter"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@points(lambda impl, op: impl != "cuda" or op in backends.KERNELS["cuda"], "the op has no kernel in CUDA C++")
def test_values_and_gradients(impl, op, device, tolerances, fuzz):

    @fuzz(SHARES[impl])
    @given(st.data())
    def check(data):
        # torch's own products in 16 bits may be all wrong if the result is a single element.
        dtype = data.draw(st.sampled_from(DTYPES[:1] if impl == "composed" else DTYPES), "dtype")
        call = draw_call(data, op, impl, dtype, device).map(draw_layouts(data, SAME))
        gradients = tuple(map(draw_layouts(data, [*SAME, *LAYOUTS.values()]), call.output_gradients()))
        OPS[op].compare(call, impl, tolerances[dtype], gradients=gradients, rounded=True)

    check()
