"""multi_lora: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastcss import PackedLora, _backends, multi_lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = ("cpu", "triton")
IMPLEMENTATIONS = ("composed", *COMPILED)
RANKS = (3, 0, 32, 1, 24)


def runs(impl: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """``impl``, or skip this test with the reason why it does not run here."""
    reason = _backends.why_not(impl, torch.empty(0, device=device, dtype=dtype))
    if reason:
        pytest.skip(f"{impl}: {reason}")
    return impl


class Inputs(NamedTuple):
    """The tensors of one call, in the order of its gradients."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    lora: PackedLora  # ranks, offsets, scales
    mode: str
    index: torch.Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """New leaves that require gradients, with the strides these have."""
        tensors = (t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in self[:5])
        return Inputs(*tensors, *self[5:])

    def call(self, impl: str) -> torch.Tensor:
        lora = dataclasses.replace(self.lora, a=self.a, b=self.b)
        return multi_lora(self.x, self.weight, lora, self.bias, mode=self.mode, index=self.index, impl=impl)

    def results(self, impl: str, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output and the gradient of every input."""
        y = self.call(impl)
        given = {name: t for name, t in zip(self._fields[:5], self[:5], strict=True) if t is not None}
        gradients = torch.autograd.grad(y, list(given.values()), dy.to(y.dtype), materialize_grads=True)
        return {"y": y.detach(), **dict(zip(given, gradients, strict=True))}


def make(mode, rows, k, n, ranks, *, index=None, bias=True, dtype=torch.float32, lora_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots = () if mode == "shared" else (len(ranks) if mode == "diverged" else len(index),)
    lora_a = [normal(r, k, dtype=lora_dtype or dtype) for r in ranks]
    lora_b = [normal(n, r, dtype=lora_dtype or dtype) for r in ranks]
    lora = PackedLora.pack(lora_a, lora_b, [0.5 + 0.25 * t for t in range(len(ranks))])
    index = None if index is None else torch.tensor(index, dtype=torch.int64, device=device)
    return Inputs(
        normal(*slots, *rows, k), normal(n, k), lora.a, lora.b, normal(n) if bias else None, lora, mode, index
    )  # fmt: skip


def output_gradient(inputs: Inputs) -> torch.Tensor:
    slots = inputs.lora.num_adapters if inputs.index is None else inputs.index.shape[0]
    inner = inputs.x.shape[:-1] if inputs.mode == "shared" else inputs.x.shape[1:-1]
    shape = (slots, *inner, inputs.weight.shape[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs.x.device, inputs.x.dtype)


def assert_as_good_as_eager(inputs: Inputs, impl: str, tolerance: float, dy: torch.Tensor | None = None) -> None:
    """Values and gradients are no further from the float64 reference than those of the literal eager code."""
    dy = output_gradient(inputs) if dy is None else dy
    exact = inputs.leaves(torch.float64).results("reference", dy)
    eager = inputs.leaves().results("reference", dy)
    ours = inputs.leaves().results(impl, dy)
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == eager[name].dtype, name
        if want.numel() == 0:
            continue
        for order in (2, float("inf")):
            limit = 1.2 * _error(eager[name], want, order) + tolerance
            assert _error(ours[name], want, order) <= limit, (name, order)


def _error(got: torch.Tensor, want: torch.Tensor, order: float) -> float:
    """The distance in a norm, relative to ``want``."""
    size = torch.linalg.vector_norm(want, order).item()
    return torch.linalg.vector_norm(got.double() - want, order).item() / (size or 1.0)


CASES = {
    "one element": {"mode": "shared", "rows": (1,), "k": 1, "n": 1, "ranks": (1,)},
    "a vector": {"mode": "shared", "rows": (), "k": 9, "n": 5, "ranks": (2, 3)},
    "a vector a task": {"mode": "diverged", "rows": (), "k": 9, "n": 5, "ranks": (2, 3)},
    "no rows": {"mode": "shared", "rows": (0,), "k": 7, "n": 5, "ranks": (3, 0, 2)},
    "no samples": {"mode": "routed", "rows": (4,), "k": 7, "n": 5, "ranks": (3, 2), "index": []},
    "no inputs": {"mode": "diverged", "rows": (3,), "k": 0, "n": 5, "ranks": (3, 2)},
    "no outputs": {"mode": "shared", "rows": (3,), "k": 7, "n": 0, "ranks": (3, 2)},
    "ranks all 0, shared": {"mode": "shared", "rows": (6,), "k": 7, "n": 5, "ranks": (0, 0)},
    "ranks all 0, routed": {"mode": "routed", "rows": (6,), "k": 7, "n": 5, "ranks": (0, 0), "index": [1, -1, 0]},
    "shared": {"mode": "shared", "rows": (5, 3), "k": 37, "n": 29, "ranks": RANKS},
    "shared, tall": {"mode": "shared", "rows": (131,), "k": 37, "n": 140, "ranks": RANKS, "bias": False},
    "shared, rank 200": {"mode": "shared", "rows": (70,), "k": 24, "n": 40, "ranks": (200, 3, 0)},
    "diverged": {"mode": "diverged", "rows": (2, 9), "k": 37, "n": 29, "ranks": RANKS, "bias": False},
    "diverged, tall": {"mode": "diverged", "rows": (67,), "k": 33, "n": 65, "ranks": RANKS},
    "diverged, rank 200": {"mode": "diverged", "rows": (7,), "k": 24, "n": 40, "ranks": (200, 3, 0)},
    "routed": {"mode": "routed", "rows": (3,), "k": 37, "n": 29, "ranks": RANKS, "index": [2, -1, 0, 2, 3, 1, 2]},
    "routed, many rows": {"mode": "routed", "rows": (530,), "k": 17, "n": 19, "ranks": (8, 20), "index": [1, 1, -1]},
    "routed, nobody": {"mode": "routed", "rows": (3,), "k": 17, "n": 19, "ranks": (8, 20), "index": [-1, -1]},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_and_gradients(impl, case, dtype, device, tolerances):
    inputs = make(**CASES[case], dtype=dtype, device=device)
    assert_as_good_as_eager(inputs, runs(impl, device), tolerances[dtype])


@pytest.mark.parametrize("mode", ["shared", "diverged"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_adapters_of_a_bfloat16_model(impl, mode, device, tolerances):
    inputs = make(mode, (70,), 37, 29, RANKS, dtype=torch.bfloat16, lora_dtype=torch.float32, device=device)
    assert_as_good_as_eager(inputs, runs(impl, device), tolerances[torch.bfloat16])


def test_the_reference_is_the_equation(device):
    """Against merged weights, which share nothing with any implementation."""
    inputs = make("diverged", (5,), 7, 6, (3, 0, 2), dtype=torch.float64, device=device)
    for t, y in enumerate(inputs.call("reference")):
        rows = slice(*inputs.lora.offsets[t : t + 2].tolist())
        merged = inputs.weight + inputs.lora.scales[t] * inputs.b[rows].t() @ inputs.a[rows]
        torch.testing.assert_close(y, inputs.x[t] @ merged.t() + inputs.bias, rtol=1e-12, atol=1e-12)


# --- strides ---------------------------------------------------------------------------------------------------------

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
    inputs = make(mode, (66,), 21, 18, (3, 0, 17), index=index, device=device)
    change = LAYOUTS[layout]
    strided = [change(t) for t in inputs[:4]]
    inputs = inputs._replace(**dict(zip(inputs._fields, strided, strict=False)), bias=inputs.bias[:1].expand(18))
    if index:
        inputs = inputs._replace(index=torch.stack([inputs.index] * 2, -1).to(torch.int32)[:, 0])
    dy = change(output_gradient(inputs))
    assert_as_good_as_eager(inputs, runs(impl, device), tolerances[torch.float32], dy)


@st.composite
def any_inputs(draw):
    mode = draw(st.sampled_from(["shared", "diverged", "routed"]))
    ranks = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    index = draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=5)) if mode == "routed" else None
    rows = draw(st.lists(st.integers(0, 20), max_size=2))
    k, n, seed = draw(st.integers(0, 50)), draw(st.integers(0, 50)), draw(st.integers(0, 2**31))
    inputs = make(mode, rows, k, n, ranks, index=index, bias=draw(st.booleans()), seed=seed)
    layouts = st.sampled_from([lambda t: t, *list(LAYOUTS.values())[:3]])
    x = draw(layouts)(inputs.x) if inputs.x.dim() > 1 else inputs.x
    return inputs._replace(
        x=x, weight=draw(layouts)(inputs.weight), a=draw(layouts)(inputs.a), b=draw(layouts)(inputs.b)
    )


@pytest.mark.parametrize(("impl", "examples"), [("composed", 10), ("cpu", 30), ("triton", 8)])
def test_any_shape_and_stride(impl, examples, device, tolerances):
    runs(impl, device)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(any_inputs())
    def check(inputs):
        moved = (t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs[:5])
        lora = dataclasses.replace(
            inputs.lora, offsets=inputs.lora.offsets.to(device), scales=inputs.lora.scales.to(device)
        )
        index = None if inputs.index is None else inputs.index.to(device)
        assert_as_good_as_eager(Inputs(*moved, lora, inputs.mode, index), impl, tolerances[torch.float32])

    check()


# --- slots do not see each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, rows, device):
    inputs = make("routed", (rows,), 37, 29, RANKS, index=[2, 0, 2], dtype=torch.bfloat16, device=device)
    dy = output_gradient(inputs)
    first, again = (inputs.leaves().results(runs(impl, device), dy) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_a_sample_does_not_depend_on_its_batch(impl, rows, device):
    """Bitwise: alone, or among samples of other adapters, some of which are NaN."""
    inputs = make("routed", (rows,), 37, 29, RANKS, index=[2, 0, 4, -1], dtype=torch.bfloat16, device=device)
    inputs.x[1] = float("nan")
    dy = output_gradient(inputs)
    dy[1] = float("nan")
    together = inputs.leaves().results(runs(impl, device), dy)
    for s in (0, 2, 3):
        alone = inputs._replace(x=inputs.x[s : s + 1], index=inputs.index[s : s + 1]).leaves()
        alone = alone.results(impl, dy[s : s + 1])
        assert torch.equal(alone["y"][0], together["y"][s])
        assert torch.equal(alone["x"][0], together["x"][s])
        if s < 3:
            own = slice(*inputs.lora.offsets[inputs.index[s] :][:2].tolist())
            assert torch.equal(alone["a"][own], together["a"][own])
            assert torch.equal(alone["b"][own], together["b"][own])


@pytest.mark.parametrize("mode", ["shared", "diverged"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_of_an_adapter_stays_with_it(impl, mode, device):
    inputs = make(mode, (70,), 37, 29, RANKS, device=device)
    clean = inputs.call(runs(impl, device))
    second = slice(*inputs.lora.offsets[2:4].tolist())
    inputs.a[second] = float("nan")
    y = inputs.call(impl)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_index_minus_one_is_the_bare_layer(impl, rows, device):
    """Whatever the adapters hold, NaN too: no part of them reaches the result or the gradients."""
    inputs = make("routed", (rows,), 37, 29, RANKS, index=[-1, -1], device=device)
    inputs.a.fill_(float("nan"))
    inputs = inputs.leaves()
    dy = output_gradient(inputs)
    got = inputs.results(runs(impl, device), dy)
    torch.testing.assert_close(got["y"], torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))
    torch.testing.assert_close(got["x"], dy @ inputs.weight)
    assert not got["a"].count_nonzero()
    assert not got["b"].count_nonzero()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_and_inf_propagate(impl, mode, value, device):
    for rows in (4, 70):
        index = [1, -1, 0] if mode == "routed" else None
        inputs = make(mode, (rows,), 21, 18, (3, 17, 0), index=index, device=device)
        inputs.x[..., 2, 5] = value
        want, got = inputs.call("reference"), inputs.call(runs(impl, device))
        assert torch.equal(want.isfinite(), got.isfinite())
        assert not got[..., 2, :].isfinite().any()


# --- memory and the device ------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that torch allocates."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.bytes.append(result.nbytes)
        return result


PEAK_MEMORY = """
import sys, torch, fastcss
M, K, N, ranks, mode = 16384, 256, 256, (8,) * 6, sys.argv[1]

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

lora = fastcss.PackedLora.pack([torch.ones(r, K) for r in ranks], [torch.ones(N, r) for r in ranks], [1.0] * 6)
x = torch.ones(*((len(ranks),) if mode == "diverged" else ()), M, K)
weight = torch.ones(N, K)
fastcss.multi_lora(x[..., :64, :], weight, lora, mode=mode, impl="cpu")
before = status("VmRSS")
y = fastcss.multi_lora(x, weight, lora, mode=mode, impl="cpu")
print(status("VmHWM") - before - y.nbytes, M * sum(ranks) * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mode", ["shared", "diverged"])
def test_cpu_peak_memory(mode):
    """y and O(M·Σr), by what the process really holds: no [T, M, N] temporary (100 MB here), no copy of x per task."""
    runs("cpu", "cpu")
    printed = subprocess.run([sys.executable, "-c", PEAK_MEMORY, mode], capture_output=True, text=True, check=True)
    extra, hidden = map(int, printed.stdout.split())
    assert extra <= hidden + (8 << 20)  # 8 MiB: packed weights, and a block of rows for each of the threads


@pytest.mark.parametrize("mode", ["shared", "diverged"])
def test_triton_allocates_the_result_and_the_hidden_activations(mode, device):
    """Forward: y and O(M·Σr). Backward: the gradients, O(M·Σr), and one [M, N] where x is shared; no [T, M, N]."""
    runs("triton", device)
    from fastcss.kernels.multi_lora import multi_lora as forward
    from fastcss.kernels.multi_lora_backward import multi_lora_backward as backward

    inputs = make(mode, (100,), 64, 96, (4,) * 8, device=device)
    tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, None)
    hidden = 100 * 32 * 4
    with Allocations() as allocated:
        y, h = forward(inputs.x, inputs.weight, inputs.bias, *tensors, 4, True)
    assert sum(allocated.bytes) == y.nbytes + hidden == y.nbytes + h.nbytes
    with Allocations() as allocated:
        gradients = backward(y, inputs.x, inputs.weight, *tensors, h, 4, True, True)
    sum_of_dy = 100 * 96 * 4 if mode == "shared" else 0
    assert sum(allocated.bytes) == sum(g.nbytes for g in gradients) + hidden + sum_of_dy


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_cuda_graph_replays_without_a_sync(impl, mode, device):
    if device != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    for rows in (4, 300):
        index = [1, -1, 0, 7] if mode == "routed" else None  # 7 is wrong: NaN, not an error
        inputs = make(mode, (rows,), 64, 96, (4, 200, 0), index=index, dtype=torch.bfloat16, device=device)
        dy, inputs = output_gradient(inputs), inputs.leaves()
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = inputs.results(runs(impl, device), dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = inputs.results(impl, dy)
        graph.replay()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, equal_nan=True)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-2, 2, 2**40])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_index_out_of_range_raises_on_cpu(impl, wrong):
    inputs = make("routed", (3,), 7, 5, (2, 3), index=[0, wrong])
    with pytest.raises(IndexError, match="index"):
        inputs.call(runs(impl, "cpu"))


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


# --- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, mode, device):
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (2,), 3, 4, (2, 0, 1), index=index, dtype=torch.float64, device=device).leaves()
    torch.autograd.gradcheck(lambda *t: Inputs(*t, *inputs[5:]).call(impl), inputs[:5])


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", COMPILED)
def test_finite_differences(impl, mode, rows, device):
    """Along a random direction of each input; the op is linear in each, so a central difference has no bias."""
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (rows,), 21, 18, (3, 0, 17), index=index, device=device).leaves()
    dy = output_gradient(inputs)
    gradients = inputs.results(runs(impl, device), dy)
    for name in ("x", "weight", "a", "b", "bias"):
        value = getattr(inputs, name).detach()
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(device)
        up, down = (inputs._replace(**{name: value + step * direction}).call(impl) for step in (0.5, -0.5))
        slope = ((up - down).double() * dy).sum()
        torch.testing.assert_close((gradients[name] * direction).double().sum(), slope, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("needs", ["x", "a", "weight"])
@pytest.mark.parametrize("impl", COMPILED)
def test_only_what_is_asked_for_is_differentiated(impl, needs, device):
    inputs = make("shared", (5,), 21, 18, (3, 0, 17), device=device)
    dy = output_gradient(inputs)
    want = inputs.leaves().results(runs(impl, device), dy)[needs]
    leaf = getattr(inputs, needs).detach().requires_grad_()
    y = inputs._replace(**{needs: leaf}).call(impl)
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], want)


@pytest.mark.parametrize("impl", COMPILED)
def test_double_backward_raises(impl, device):
    inputs = make("shared", (3,), 7, 5, (2, 1), device=device).leaves()
    (gradient,) = torch.autograd.grad(inputs.call(runs(impl, device)).sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    """float32 parameters, a bfloat16 layer: the same as casting by hand, and the gradients come back in float32."""
    inputs = make("shared", (6,), 21, 18, (3, 0, 17), device=device).leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = inputs.call(runs(impl, device))
    by_hand = inputs.leaves(torch.bfloat16)
    assert torch.equal(y, by_hand.call(impl))
    dy = output_gradient(inputs).to(torch.bfloat16)
    ours = torch.autograd.grad(y, inputs[:5], dy)
    for got, want in zip(ours, torch.autograd.grad(by_hand.call(impl), by_hand[:5], dy), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


# --- torch.library, torch.compile, torch.vmap ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, mode, device):
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (4,), 7, 5, (2, 0, 3), index=index, device=device)
    forward, backward = (
        getattr(op, runs(impl, device)) for op in (torch.ops.fastcss.multi_lora, torch.ops.fastcss.multi_lora_backward)
    )
    tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
    for save_h in (False, True):
        arguments = (inputs.x, inputs.weight, inputs.bias, *tensors, 3, save_h)
        torch.library.opcheck(forward, arguments)
        y, h = forward(*arguments)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (torch.ones_like(y), inputs.x, inputs.weight, *tensors, h, 3, *needs))


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", COMPILED)
def test_the_saved_hidden_states(impl, mode, device):
    """h is scale · x Aᵀ as the schema lays it out, and the gradients are the same whether it was saved or not."""
    for rows in (4, 70):
        index = [1, -1, 2] if mode == "routed" else None
        inputs = make(mode, (rows,), 7, 5, (2, 0, 3), index=index, device=device)
        tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
        forward = getattr(torch.ops.fastcss.multi_lora, runs(impl, device))
        y, h = forward(inputs.x, inputs.weight, inputs.bias, *tensors, 3, True)
        for s, t in enumerate((1, -1, 2) if index else range(3)):
            start, end = inputs.lora.offsets[t : t + 2].tolist() if t >= 0 else (0, 0)
            x = inputs.x if mode == "shared" else inputs.x[s]
            got = h[s, :, : end - start] if index else h[:, start:end]
            torch.testing.assert_close(got, inputs.lora.scales[t] * x @ inputs.a[start:end].t())
        backward = getattr(torch.ops.fastcss.multi_lora_backward, impl)
        dy = torch.randn_like(y)
        saved, again = (
            backward(dy, inputs.x, inputs.weight, *tensors, kept, 3, True, True) for kept in (h, h.new_empty(0))
        )
        for one, other in zip(saved, again, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["shared", "routed"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, mode, device):
    index = [1, -1, 1] if mode == "routed" else None
    inputs = make(mode, (4,), 7, 5, (2, 0, 3), index=index, device=device)
    dy = output_gradient(inputs)
    eager = inputs.leaves()
    want = eager.results(runs(impl, device), dy)
    compiled = inputs.leaves()

    @torch.compile(fullgraph=True, backend="inductor" if impl == "cpu" else "aot_eager")
    def run(x, weight, a, b, bias):
        return 2 * Inputs(x, weight, a, b, bias, *inputs[5:]).call(impl)

    y = run(*compiled[:5])
    torch.testing.assert_close(y, 2 * want.pop("y"))
    for got, name in zip(torch.autograd.grad(y, compiled[:5], dy / 2), inputs._fields, strict=False):
        torch.testing.assert_close(got, want[name])


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
    """What torch.vmap means."""
    samples = ([v if d is None else v[i] for v, d in zip(arguments, in_dims, strict=True)] for i in range(4))
    return torch.stack([function(*sample) for sample in samples])


@pytest.mark.parametrize("name", VMAPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_vmap(impl, name, device):
    function, arguments, in_dims = _mapped(name, runs(impl, device), device)
    want = _loop(function, arguments, in_dims)
    torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), want)


@pytest.mark.parametrize("name", VMAPS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_training_through_vmap(impl, name, device):
    """Gradients of a vmapped call, and vmapped gradients of a call (torch.func)."""
    function, arguments, in_dims = _mapped(name, runs(impl, device), device)
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
