"""Checks what holds for every op, wherever it runs, however often, and under whichever transform."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence

import memory_child
import pytest
import torch
from calls import Call, normal
from torch import Tensor


def assert_bitwise(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Compare everything that is wanted, bit by bit."""
    for name in want:
        assert torch.equal(got[name], want[name]), name


def assert_reproducible(call: Call, impl: str) -> None:
    dys = call.output_gradients()
    assert_bitwise(call.leaves().results(impl, dys), call.leaves().results(impl, dys))


def assert_same_on_any_number_of_threads(call: Call) -> None:
    dys, threads = call.output_gradients(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(call.leaves().results("cpu", dys))
    finally:
        torch.set_num_threads(threads)
    assert_bitwise(found[1], found[0])
    assert_bitwise(found[2], found[0])


def assert_batch_invariant(call: Call, impl: str, shared: tuple[str, ...] = ()) -> None:
    """Bitwise: an image gives the same alone and among others, one of which is NaN. ``shared`` has no image's own."""
    dys = call.output_gradients()
    tensors = {name: tensor.clone() for name, tensor in call.tensors.items() if name not in shared}
    for tensor in tensors.values():
        tensor[1] = float("nan")
    together = call.having(**tensors).leaves().results(impl, dys)
    together = {name: tensor for name, tensor in together.items() if name[1:] not in shared}
    options = {name: value for name, value in call.options.items() if isinstance(value, Tensor)}
    for i in (0, 2):
        one = {name: call.tensors[name][i : i + 1] for name in tensors}
        one |= {name: value[i : i + 1] for name, value in options.items()}
        alone = call.having(**one).leaves().results(impl, tuple(dy[i : i + 1] for dy in dys))
        assert_bitwise(alone, {name: tensor[i : i + 1] for name, tensor in together.items()})


def assert_gradients_as_reference(call: Call, impl: str) -> None:
    """Those of the literal code in float32, whatever their size: at a row of zeros 1e12 times those elsewhere."""
    dys = call.output_gradients()
    want, got = (call.leaves().results(name, dys) for name in ("reference", impl))
    for name in (f"d{name}" for name in call.tensors):
        error = torch.linalg.vector_norm(got[name].double() - want[name].double())
        assert error <= 1e-5 * torch.linalg.vector_norm(want[name].double()), name


def assert_not_finite_as_reference(call: Call, impl: str, nan_stays: bool = True) -> None:
    """Check that exactly those values are not finite which are not in the literal code; NaN there must be NaN here."""
    dys = call.output_gradients()
    want, got = (call.leaves().results(name, dys) for name in ("reference", impl))
    for name in want:
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
        if nan_stays and not name.startswith(
            "d"
        ):  # a gradient that is inf − inf in one order of its sums is inf in another
            assert got[name][want[name].isnan()].isnan().all(), name
    assert not all(t.isfinite().all() for t in want.values())


def assert_compiles(call: Call, impl: str) -> None:
    """One graph, forward and backward, and the same values."""
    dys, eager, compiled = call.output_gradients(), call.leaves(), call.leaves()
    want = list(eager.results(impl, dys).values())

    @torch.compile(fullgraph=True, backend="inductor" if impl == "cpu" else "aot_eager")
    def run(*tensors):
        return [2 * y for y in call.having(**dict(zip(call.tensors, tensors, strict=True)))(impl)]

    torch.compiler.reset()
    outputs = run(*compiled.tensors.values())
    found = _gradients(outputs, [dy / 2 for dy in dys], list(compiled.tensors.values()))
    for got, expected in zip((*(y.detach() / 2 for y in outputs), *found), want, strict=True):
        expected = expected if expected.is_floating_point() else expected.to(got.dtype)
        torch.testing.assert_close(got, expected)


def _gradients(outputs: Sequence[Tensor], dys: Sequence[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the gradients of the outputs that have any; nothing if none has."""
    pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    if not pairs:
        return ()
    differentiable, given = zip(*pairs, strict=True)
    return torch.autograd.grad(differentiable, leaves, given)


def assert_autocasts(call: Call, impl: str, device: str) -> None:
    """float32 tensors in a bfloat16 region: as if cast by hand, and the gradients come back in float32."""
    by_hand = call.leaves(torch.bfloat16)
    dys, call = by_hand.output_gradients(), call.leaves()
    want = by_hand.results(impl, dys)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = call(impl)
    found = _gradients(outputs, dys, list(call.tensors.values()))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for got, expected in zip((*outputs, *found), want.values(), strict=True):
        assert got.is_floating_point() == expected.is_floating_point()
        assert torch.equal(got.float(), expected.float())


def assert_maps(call: Call, impl: str, mapped: tuple[str, ...], samples: int = 2) -> None:
    """torch.vmap over ``mapped`` is a loop: values, gradients through it, and gradients for each sample."""
    arguments = {**call.tensors, **{n: v for n, v in call.options.items() if isinstance(v, Tensor)}}
    in_dims = tuple(0 if name in mapped else None for name in arguments)
    stacked = [_stack(v, samples) if name in mapped else v for name, v in arguments.items()]
    leaves = [v.clone().requires_grad_() for v in stacked[: len(call.tensors)]]
    whole = (*leaves, *stacked[len(leaves) :])

    def run(*values):
        return call.having(**dict(zip(arguments, values, strict=True)))(impl)

    def loss(*values):
        return _squares(run(*values))

    one_by_one = [[v if d is None else v[i] for v, d in zip(whole, in_dims, strict=True)] for i in range(samples)]
    want = [torch.stack(parts) for parts in zip(*(run(*values) for values in one_by_one), strict=True)]
    got = torch.vmap(run, in_dims)(*whole)
    if not any(y.requires_grad for y in want):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        return
    if impl != "triton":  # whichever axis is mapped
        turned = [v.detach() if d is None else v.detach().movedim(0, -1) for v, d in zip(whole, in_dims, strict=True)]
        along = torch.vmap(run, tuple(None if d is None else -1 for d in in_dims))(*turned)
        for one, other in zip(along, got, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(_squares(outputs), leaves) for outputs in (want, got)]
    per_sample = torch.vmap(torch.func.grad(loss, argnums=tuple(range(len(leaves)))), in_dims)(
        *map(Tensor.detach, whole)
    )
    for one, other in zip((*got, *slopes[1]), (*want, *slopes[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other, dim in zip(per_sample, slopes[0], in_dims, strict=False):
        torch.testing.assert_close(one if dim == 0 else one.sum(0), other, rtol=1e-4, atol=1e-5)


def _squares(outputs: Sequence[Tensor]) -> Tensor:
    return sum(y.square().sum() for y in outputs if y.is_floating_point())


def _stack(value: Tensor, samples: int) -> Tensor:
    """Different samples of a tensor: turned along its last dimension."""
    return torch.stack([value.roll(i, -1) for i in range(samples)])


def gradcheck(call: Call, impl: str) -> None:
    call = call.leaves()

    def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for y in call.having(**dict(zip(call.tensors, tensors, strict=True)))(impl) if y.requires_grad)

    torch.autograd.gradcheck(differentiable, list(call.tensors.values()))


def assert_once_differentiable(call: Call, impl: str) -> None:
    """Check that a kernel refuses second derivatives; the composed form must have those of the reference."""

    def second(impl: str) -> list[Tensor]:
        leaves = call.leaves()
        tensors = list(leaves.tensors.values())
        first = torch.autograd.grad(_squares(leaves(impl)), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    if impl == "composed":
        for got, want in zip(second(impl), second("reference"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match=r"^[a-z_]+: differentiable once.*impl='composed'"):
            second(impl)


def assert_slope(call: Call, impl: str) -> None:
    """Each gradient, along a direction, is the central difference of the float64 reference."""
    dys = call.output_gradients()
    gradients = call.leaves().results(impl, dys)
    wide = call.leaves(torch.float64)
    with torch.no_grad():
        for seed, (name, value) in enumerate(wide.tensors.items()):
            direction = normal(*value.shape, seed=50 + seed, dtype=torch.float64, device=value.device)
            up, down = (wide.having(**{name: value + step * direction})("reference") for step in (1e-5, -1e-5))
            slope = sum(((a - b) * dy).sum() for a, b, dy in zip(up, down, dys, strict=True)) / 2e-5
            got = (gradients[f"d{name}"].double() * direction).sum()
            size = torch.linalg.vector_norm(gradients[f"d{name}"].double())  # of the slope along a usual direction
            assert abs(got - slope) <= 1e-4 * size, name


def opcheck(name: str, impl: str, *arguments) -> tuple[Tensor, ...]:
    """torch.library.opcheck of a raw op; returns what it computes.

    Implementations share a fake kernel, and so Triton's interpreter is spared the trace with sizes left open; with
    fixed ones ``assert_compiles`` traces each.
    """
    of_all = ("test_schema", "test_autograd_registration", "test_faketensor")
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    torch.library.opcheck(raw(name, impl), arguments, **({"test_utils": of_all} if interpreted else {}))
    return raw(name, impl)(*arguments)


def raw(name: str, impl: str) -> Callable:
    """The op beneath the public function and its checks."""
    return getattr(getattr(torch.ops.fastcss, name), impl)


# --- memory ----------------------------------------------------------------------------------------------------------


def extra_memory(**parts: str) -> int:
    """Most bytes a process of its own held during a call beyond its inputs and results, by what the system says."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=_imported()) as pool:
        return pool.submit(memory_child.extra_memory, **parts).result()


@functools.cache
def _imported() -> multiprocessing.context.BaseContext:
    """A process that has imported torch and done nothing: children of it need not import it for two seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastcss.ops"])
    return context
