"""Tests every op under tracers other than torch.compile and torch.export, from which no value can be read."""

import pytest
import torch
from small_calls import SHAPES, function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's own about its tracers


@pytest.mark.parametrize("op", SHAPES)
def test_linearize_is_value_and_tangent(op):
    f, tensors = function(op, "auto")
    moving = [t for t in tensors if t.is_floating_point()]

    def of(*floats):
        floats = iter(floats)
        return f(*(next(floats) if t.is_floating_point() else t for t in tensors))

    along = tuple(map(torch.cos, moving))
    try:
        value, tangent = torch.func.jvp(of, tuple(moving), along)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=op):
            torch.func.linearize(of, *moving)
        return
    linear_value, linear = torch.func.linearize(of, *moving)
    torch.testing.assert_close(linear_value, value)
    torch.testing.assert_close(linear(*along), tangent)


@pytest.mark.parametrize("op", SHAPES)
def test_a_traced_graph_has_the_values(op):
    f, tensors = function(op, "auto")
    with torch.no_grad():
        graph = make_fx(f)(*tensors)
        torch.testing.assert_close(graph(*tensors), f(*tensors), atol=0, rtol=0)


@pytest.mark.parametrize("op", ["affinity_loss", "prompt_mlp", "scatter_cost", "top_margin", "multi_lora routed"])
def test_fake_tensors_have_the_shape(op):
    f, tensors = function(op, "auto")
    wanted = f(*tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = f(*map(mode.from_tensor, tensors))
    assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
