"""A call of an op with its inputs, and its comparison with the float64 reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcss import _backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = ("cpu", "triton")
IMPLEMENTATIONS = ("composed", *COMPILED)
#: Of the ops that have a kernel in CUDA C++, too.
COMPILED_CUDA = (*COMPILED, "cuda")
IMPLEMENTATIONS_CUDA = (*IMPLEMENTATIONS, "cuda")


def runs(op: Callable, impl: str, device: str, light: bool = True) -> str:
    """``impl``, or skip this test with the reason why it does not run here.

    Triton's interpreter, some thousand times slower than a GPU, takes only the ``light`` points of a test.
    """
    reason = _backends.why_not(impl, torch.empty(0, device=device))
    if reason is None and impl == "triton" and device == "cpu" and not light:
        reason = f"{op.__name__} has enough points without this one in Triton's interpreter"
    if reason:
        pytest.skip(f"{impl}: {reason}")
    return impl


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: the tensors it is differentiated in, and its other arguments."""

    op: Callable
    tensors: dict[str, Tensor]
    options: dict = dataclasses.field(default_factory=dict)

    def having(self, **changes) -> Call:
        """With other tensors or other options."""
        tensors = {name: changes.pop(name, tensor) for name, tensor in self.tensors.items()}
        return Call(self.op, tensors, self.options | changes)

    def leaves(self, dtype: torch.dtype | None = None) -> Call:
        """New leaves that require gradients, with the strides these have."""
        return self.having(**{n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in self.tensors.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Every tensor changed, also those that are no input of the gradient (labels)."""
        options = {n: change(v) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return Call(self.op, {n: change(t) for n, t in self.tensors.items()}, options)

    def __call__(self, impl: str) -> tuple[Tensor, ...]:
        return tuple(self.outputs(impl).values())

    def outputs(self, impl: str) -> dict[str, Tensor]:
        """By name: those of a named tuple, or the op's own."""
        results = self.op(**self.tensors, **self.options, impl=impl)
        if isinstance(results, Tensor):
            return {self.op.__name__: results}
        return dict(zip(getattr(results, "_fields", ("intra", "inter")), results, strict=True))

    def output_gradients(self) -> tuple[Tensor, ...]:
        """Random numbers that the dtype of the call can hold; zeros for an output that has no gradient."""
        dtype = next(iter(self.tensors.values())).dtype
        outputs = self.leaves()("reference")
        gradients = (normal(*y.shape, seed=9 + i, dtype=dtype, device=y.device) for i, y in enumerate(outputs))
        return tuple(dy if y.requires_grad else 0 * dy for y, dy in zip(outputs, gradients, strict=True))

    def results(self, impl: str, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs and, where these have any, the gradient of every tensor."""
        outputs, found = self.outputs(impl), {}
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs.values(), gradients, strict=True) if y.requires_grad]
        if pairs:
            leaves = list(self.tensors.values())
            differentiable, dys = zip(*pairs, strict=True)
            grads = torch.autograd.grad(differentiable, leaves, dys, materialize_grads=True)
            found = {f"d{name}": grad for name, grad in zip(self.tensors, grads, strict=True)}
        return {name: y.detach() for name, y in outputs.items()} | found


#: Of which tensors an error of ``name`` is a fraction: ``(name, exact, gradients) → tensors``; the largest counts.
Peers = Callable[[str, dict[str, Tensor], tuple[Tensor, ...]], list[Tensor]]


def assert_as_good_as_eager(
    call: Call,
    impl: str,
    tolerance: float,
    *,
    gradients: tuple[Tensor, ...] | None = None,
    peers: Peers = lambda name, exact, dys: [exact[name]],
) -> None:
    """Values and gradients are no further from the float64 reference than those of the literal eager code, and
    indices and counts are its own."""
    dys = call.output_gradients() if gradients is None else gradients
    exact = call.leaves(torch.float64).results("reference", dys)
    eager = call.leaves().results("reference", dys)
    ours = call.leaves().results(impl, dys)
    assert set(exact) <= set(ours)  # a loop over no images has no gradient
    if impl == "composed" and dys[0].dtype.itemsize == 2:
        tolerance *= 2  # torch's products round each half of a result before the halves are added, and round again
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == eager[name].dtype, name
        if not want.is_floating_point():
            assert torch.equal(ours[name], want), name
        elif want.numel():
            sized = [peer for peer in peers(name, exact, dys) if peer.numel()]
            for order in (2, math.inf):
                size = max(torch.linalg.vector_norm(peer, order).item() for peer in sized) or 1.0
                theirs, error = (
                    torch.linalg.vector_norm(x[name].double() - want, order).item() / size for x in (eager, ours)
                )
                # What is lucky in one element and unlucky in the next averages over many, not over a few.
                limit = 1.2 * theirs + tolerance * (1 if want.numel() >= 32 else 2)
                assert math.isfinite(limit), (name, order)  # or nothing would be tested
                assert error <= limit, (name, order)


# --- strides ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "NCHW": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "a slice": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded batch": lambda t: t[:1].expand(t.shape),
    "expanded rows": lambda t: t[..., :1, :].expand(t.shape),
}


def laid_out(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A row alone as the first of a matrix."""
    return change(tensor[None])[0] if tensor.dim() == 1 else change(tensor)


def check_any_shape_and_stride(
    make: Callable[..., Call],
    shapes: st.SearchStrategy,
    impl: str,
    tolerance: float,
    examples: int,
    compare: Callable[[Call, str, float], None] = assert_as_good_as_eager,
) -> None:
    """``make(*shape, seed=…)`` for any shape, its tensors in any layout that keeps the values."""
    layouts = st.sampled_from([lambda t: t, *(change for name, change in LAYOUTS.items() if "expanded" not in name)])

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(shapes, st.integers(0, 2**31), st.lists(layouts, min_size=5, max_size=5))
    def check(shape, seed, changes):
        call = make(*shape, seed=seed)
        pairs = zip(call.tensors.items(), changes, strict=False)
        compare(call.having(**{name: laid_out(t, change) for (name, t), change in pairs}), impl, tolerance)

    check()
