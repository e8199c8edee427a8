"""multi_lora: every implementation × dtype × shape, forward and backward, against the float64 reference."""

from __future__ import annotations

import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, runs
from lora_inputs import RANKS, Inputs, assert_as_good_as_eager, make, output_gradient
from torch.utils._python_dispatch import TorchDispatchMode

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
    assert_as_good_as_eager(inputs, impl, tolerances[dtype])


@pytest.mark.parametrize("mode", ["shared", "diverged"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_adapters_of_a_bfloat16_model(impl, mode, device, tolerances):
    inputs = make(mode, (70,), 37, 29, RANKS, dtype=torch.bfloat16, lora_dtype=torch.float32, device=device)
    assert_as_good_as_eager(inputs, impl, tolerances[torch.bfloat16])


def test_the_reference_is_the_equation(device):
    """Against merged weights, which share nothing with any implementation."""
    inputs = make("diverged", (5,), 7, 6, (3, 0, 2), dtype=torch.float64, device=device)
    for t, y in enumerate(inputs.call("reference")):
        rows = slice(*inputs.lora.offsets[t : t + 2].tolist())
        merged = inputs.weight + inputs.lora.scales[t] * inputs.b[rows].t() @ inputs.a[rows]
        torch.testing.assert_close(y, inputs.x[t] @ merged.t() + inputs.bias, rtol=1e-12, atol=1e-12)


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
    gradients = inputs.results(impl, dy)
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
    want = inputs.leaves().results(impl, dy)[needs]
    leaf = getattr(inputs, needs).detach().requires_grad_()
    y = inputs._replace(**{needs: leaf}).call(impl)
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], want)


@pytest.mark.parametrize("mode", ["shared", "diverged", "routed"])
@pytest.mark.parametrize("impl", COMPILED)
def test_the_saved_hidden_states(impl, mode, device):
    """h is scale · x Aᵀ as the schema lays it out, and the gradients are the same whether it was saved or not."""
    for rows in (4, 70):
        index = [1, -1, 2] if mode == "routed" else None
        inputs = make(mode, (rows,), 7, 5, (2, 0, 3), index=index, device=device)
        tensors = (inputs.a, inputs.b, inputs.lora.offsets, inputs.lora.scales, inputs.index)
        forward = getattr(torch.ops.fastcss.multi_lora, impl)
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


# --- slots do not see each other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_results_are_bitwise_reproducible(impl, rows, device):
    inputs = make("routed", (rows,), 37, 29, RANKS, index=[2, 0, 2], dtype=torch.bfloat16, device=device)
    dy = output_gradient(inputs)
    first, again = (inputs.leaves().results(impl, dy) for _ in range(2))
    checks.assert_bitwise(again, first)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("impl", COMPILED)
def test_a_sample_does_not_depend_on_its_batch(impl, rows, device):
    """Bitwise: alone, or among samples of other adapters, some of which are NaN."""
    inputs = make("routed", (rows,), 37, 29, RANKS, index=[2, 0, 4, -1], dtype=torch.bfloat16, device=device)
    inputs.x[1] = float("nan")
    dy = output_gradient(inputs)
    dy[1] = float("nan")
    together = inputs.leaves().results(impl, dy)
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
    clean = inputs.call(impl)
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
    got = inputs.results(impl, dy)
    torch.testing.assert_close(got["y"], torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))
    torch.testing.assert_close(got["x"], dy @ inputs.weight)
    assert not got["a"].count_nonzero()
    assert not got["b"].count_nonzero()


# --- memory -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", ["shared", "diverged"])
def test_cpu_peak_memory(mode):
    """y and O(M·Σr), by what the process really holds: no [T, M, N] temporary (100 MB here), no copy of x per task."""
    runs("cpu", "cpu")
    m, k, n, ranks = 16384, 256, 256, (8,) * 6
    slots = (len(ranks),) if mode == "diverged" else ()
    extra = checks.extra_memory(
        prepare="from fastcss import PackedLora\n"
        f"lora_a, lora_b = [torch.ones(r, {k}) for r in {ranks}], [torch.ones({n}, r) for r in {ranks}]\n"
        f"lora = PackedLora.pack(lora_a, lora_b, [1.0] * {len(ranks)})\n"
        f"x, weight = torch.ones({(*slots, m, k)}), torch.ones({n}, {k})",
        arguments="x",
        run=f"return ops.multi_lora(x, weight, lora, mode='{mode}', impl='cpu'),",
        small="x[..., :64, :]", large="x",
    )  # fmt: skip
    assert extra <= m * sum(ranks) * 4 + (8 << 20)  # 8 MiB: packed weights, and a block of rows for each of the threads


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
