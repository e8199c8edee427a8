"""multi_lora under torch.autocast, torch.library, torch.compile, CUDA graphs and torch.vmap."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED, IMPLEMENTATIONS
from left_out import ON_A_GPU
from lora_inputs import Inputs, make, output_gradient

from fastcss import PackedLora, multi_lora


@pytest.mark.parametrize("impl", COMPILED)
def test_double_backward_raises(impl, device):
    inputs = make("shared", (3,), 7, 5, (2, 1), device=device).leaves()
    (gradient,) = torch.autograd.grad(inputs.call(impl).sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    """float32 parameters, a bfloat16 layer: the same as casting by hand, and the gradients come back in float32."""
    inputs = make("shared", (6,), 21, 18, (3, 0, 17), device=device).leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = inputs.call(impl)
    by_hand = inputs.leaves(torch.bfloat16)
    assert torch.equal(y, by_hand.call(impl))
    dy = output_gradient(inputs).to(torch.bfloat16)
    ours = torch.autograd.grad(y, inputs[:5], dy)
    for got, want in zip(ours, torch.autograd.grad(by_hand.call(impl), by_hand[:5], dy), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, mode, device):
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (4,), 7, 5, (2, 0, 3), index=index, device=device)
    tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
    for save_h in (False, True):
        y, h = checks.opcheck("multi_lora", impl, inputs.x, inputs.weight, inputs.bias, *tensors, 3, save_h)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones_like(y), inputs.x, inputs.weight, *tensors, h, 3, *needs)
        checks.opcheck("multi_lora_backward", impl, *arguments)


@pytest.mark.parametrize("mode", ["shared", "routed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, mode, device):
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (4,), 7, 5, (2, 0, 3), index=index, device=device)
    dy = output_gradient(inputs)
    eager = inputs.leaves()
    want = eager.results(impl, dy)
    compiled = inputs.leaves()

    @torch.compile(fullgraph=True, backend="inductor" if impl == "cpu" else "aot_eager")
    def run(x, weight, a, b, bias):
        return 2 * Inputs(x, weight, a, b, bias, *inputs[5:]).call(impl)

    y = run(*compiled[:5])
    torch.testing.assert_close(y, 2 * want.pop("y"))
    for got, name in zip(torch.autograd.grad(y, compiled[:5], dy / 2), inputs._fields, strict=False):
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@ON_A_GPU
def test_cuda_graph_replays_without_a_sync(impl, mode, device):
    for rows in (4, 300):
        index = [1, -1, 0, 7] if mode == "routed" else None  # 7 is wrong: NaN, not an error
        inputs = make(mode, (rows,), 64, 96, (4, 200, 0), index=index, dtype=torch.bfloat16, device=device)
        dy, inputs = output_gradient(inputs), inputs.leaves()
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = inputs.results(impl, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = inputs.results(impl, dy)
        graph.replay()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


# --- torch.vmap -------------------------------------------------------------------------------------------------------


def _stacked(samples: int, device: str):
    generator = torch.Generator().manual_seed(3)
    x, weight, a, b = ((samples, 2, 6, 7), (5, 7), (samples, 2, 3, 7), (samples, 2, 5, 3))
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in (x, weight, a, b))


def _mapped(name: str, impl: str, device: str):
    """A function of (x, a, b) for one sample, and which of the three are mapped."""
    x, weight, a, b = _stacked(4, device)
    index = torch.tensor([[0, 1], [1, -1], [-1, -1], [1, 1]], device=device)

    def pack(a, b):
        return PackedLora.pack(list(a), list(b), [0.5, 2.0])

    def shared(x, a, b):
        return multi_lora(x[0], weight, pack(a, b), mode="shared", impl=impl)

    def diverged(x, a, b):
        return multi_lora(x, weight, pack(a, b), mode="diverged", impl=impl)

    def routed(x, a, b, index):
        return multi_lora(x, weight, pack(a, b), mode="routed", index=index, impl=impl)

    return {
        "index": (routed, (x[0], a[0], b[0], index), (None, None, None, 0)),
        "x and index": (routed, (x, a[0], b[0], index), (0, None, None, 0)),
        "adapters, shared": (shared, (x[0], a, b), (None, 0, 0)),
        "adapters, diverged": (diverged, (x[0], a, b), (None, 0, 0)),
        "adapters, routed": (routed, (x[0], a, b, index), (None, 0, 0, 0)),
        "x, shared": (shared, (x, a[0], b[0]), (0, None, None)),
        "x, diverged": (diverged, (x, a[0], b[0]), (0, None, None)),
        "x and adapters": (diverged, (x, a, b), (0, 0, 0)),
    }[name]


VMAPS = (
    "index", "x and index", "adapters, shared", "adapters, diverged", "adapters, routed",
    "x, shared", "x, diverged", "x and adapters",
)  # fmt: skip


def _loop(function, arguments, in_dims):
    """Loop over samples, which is what torch.vmap means."""
    samples = ([v if d is None else v[i] for v, d in zip(arguments, in_dims, strict=True)] for i in range(4))
    return torch.stack([function(*sample) for sample in samples])


@pytest.mark.parametrize("name", VMAPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap(impl, name, device):
    function, arguments, in_dims = _mapped(name, impl, device)
    want = _loop(function, arguments, in_dims)
    torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), want)


@pytest.mark.parametrize("name", VMAPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_training_through_vmap(impl, name, device):
    """Gradients of a vmapped call, and vmapped gradients of a call (torch.func)."""
    function, arguments, in_dims = _mapped(name, impl, device)
    leaves = [v.requires_grad_() for v in arguments[:3]]
    want = torch.autograd.grad(_loop(function, arguments, in_dims).square().sum(), leaves)
    got = torch.autograd.grad(torch.vmap(function, in_dims)(*arguments).square().sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def loss(*sample):
        return function(*sample).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims)(*(v.detach() for v in arguments))
    for one, other, dim in zip(per_sample, want, in_dims, strict=False):
        torch.testing.assert_close(one if dim == 0 else one.sum(0), other, rtol=1e-4, atol=1e-4)
