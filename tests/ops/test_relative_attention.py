"""relative_attention: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from calls import DTYPES, IMPLEMENTATIONS, NOT_OF_64_BITS, normal
from left_out import light
from relative_inputs import CASES, LARGE, assert_as_good_as_eager, make
from torch import Tensor

from fastcss._dispatch import backends
from fastcss.ops import relative_attention


@pytest.fixture(autouse=True)
def _has_a_kernel(request):
    """Skip implementations whose kernel is yet to come."""
    impl = request.node.callspec.params.get("impl") if hasattr(request.node, "callspec") else None
    if impl in backends.KERNELS and "relative_attention" not in backends.KERNELS[impl]:
        pytest.skip(f"{impl}: no kernel yet")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case in CASES and (dtype == torch.float32 or case == "to fill both"))
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    call = make(*(CASES | LARGE)[case], dtype=dtype, device=device)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


# --- what others compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "window"), [((6, 6), 0), ((8, 4), 4), ((5, 7), 4), ((3, 2), 4)], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda size: size == (5, 7))
@NOT_OF_64_BITS
def test_in_place_of_transformers_own(impl, size, window, dtype, device):
    """The layer's output and all inputs' gradients must be those of transformers' layer, between its linear layers."""
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    torch.manual_seed(0)
    config = sam.SamVisionConfig(  # "eager" rounds its softmax to float32
        hidden_size=24, num_attention_heads=3, mlp_dim=8, image_size=96, attn_implementation="sdpa"
    )
    layer = sam.SamVisionLayer(config, window).to(device, dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    attention = layer.attn
    x = normal(2, *size, 24, dtype=dtype, device=device).requires_grad_()

    def ours() -> Tensor:
        q, k, v = attention.qkv(layer.layer_norm1(x)).unflatten(3, (3, 3, 8)).unbind(3)
        pads = dict(zip(("pad_key", "pad_value"), attention.qkv.bias.view(3, 3, 8)[1:], strict=True))
        tables = attention.rel_pos_h, attention.rel_pos_w
        y = x + attention.proj(relative_attention(q, k, v, *tables, window=window or None, **pads, impl=impl))
        return y + layer.mlp(layer.layer_norm2(y))

    dout = normal(2, *size, 24, seed=1, dtype=dtype, device=device)
    leaves = [x, *layer.parameters()]
    found = [[y.detach(), *torch.autograd.grad(y, leaves, dout)] for y in (ours(), layer(x))]
    for got, want in zip(*found, strict=True):
        assert torch.linalg.vector_norm(got - want) <= (1e-5 if dtype == torch.float32 else 1e-13) * max(
            torch.linalg.vector_norm(tensor) for tensor in (want, found[1][0])
        )
