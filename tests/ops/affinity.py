"""A call of an affinity op with its inputs, and its comparison with the float64 reference."""

from __future__ import annotations

import dataclasses
import functools
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
        results = self.op(**self.tensors, **self.options, impl=impl)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def output_gradients(self) -> tuple[Tensor, ...]:
        """Random numbers that the dtype of the call can hold."""
        dtype = next(iter(self.tensors.values())).dtype
        with torch.no_grad():
            outputs = self("reference")
        return tuple(normal(*y.shape, seed=9 + i, dtype=dtype, device=y.device) for i, y in enumerate(outputs))

    def results(self, impl: str, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs and the gradient of every tensor."""
        outputs = self(impl)
        given = [dy.to(y.dtype) for y, dy in zip(outputs, gradients, strict=True)]
        found = torch.autograd.grad(outputs, list(self.tensors.values()), given, materialize_grads=True)
        names = {1: (self.op.__name__,), 2: ("intra", "inter")}[len(outputs)]
        differentiated = (f"d{name}" for name in self.tensors)
        return dict(zip((*names, *differentiated), (*(y.detach() for y in outputs), *found), strict=True))


def assert_as_good_as_eager(
    call: Call, impl: str, tolerance: float, *, gradients: tuple[Tensor, ...] | None = None, flat: bool = False
) -> None:
    """Values and gradients are no further from the float64 reference than those of the literal eager code.

    ``flat``: the sigmoid is, nearly everywhere. Then errors of dq and dk count at the size these have where it
    is steep, at logits of 0: an error of the sigmoid itself is one at its full range, and so is one of its slope.
    """
    dys = call.output_gradients() if gradients is None else gradients
    exact = call.leaves(torch.float64).results("reference", dys)
    eager = call.leaves().results("reference", dys)
    ours = call.leaves().results(impl, dys)
    if impl == "composed" and dys[0].dtype.itemsize == 2:
        tolerance *= 2  # torch's products round each half of a result before the halves are added, and round again
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == eager[name].dtype, name
        if want.numel() == 0:
            continue
        peers = _peers(call, name, exact, dys, flat)
        for order in (2, math.inf):
            size = max(torch.linalg.vector_norm(peer, order).item() for peer in peers) or 1.0
            theirs, error = (
                torch.linalg.vector_norm(x[name].double() - want, order).item() / size for x in (eager, ours)
            )
            # What is lucky in one element and unlucky in the next averages over many, not over a few.
            limit = 1.2 * theirs + tolerance * (1 if want.numel() >= 32 else 2)
            assert math.isfinite(limit), (name, order)  # or nothing would be tested
            assert error <= limit, (name, order)


def _peers(call: Call, name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...], flat: bool) -> list[Tensor]:
    """The tensors of whose size an error of ``name`` is a fraction: the largest counts."""
    if name in ("intra", "inter") and call.op.__name__ == "affinity_attention":
        # Complementary shares of one sum: where M is 1 − 1e-13, inter is 1e-13 of it, and what rounding the sum costs
        # it cannot lose again. The docstring promises exactness at the size of the sum.
        return [exact["intra"], exact["inter"]]
    if flat and name in ("dq", "dk"):
        steep = call.having(**{name[1:]: torch.zeros_like(call.tensors[name[1:]])})
        return [exact[name], steep.leaves(torch.float64).results("reference", dys)[name]]
    if name == "dlogits":
        # w (f · dc − c · dc), c the centre that w gives: nothing is left where the pixels are all alike, or one.
        logits, feats = (tensor.double() for tensor in call.tensors.values())
        weights = (logits.log_softmax(1) if call.options["over"] == "classes" else logits).softmax(2)
        return [exact[name], weights * (dys[0].double() @ feats.mT)]
    return [exact[name]]


def saturated(call: Call, logit: float) -> Call:
    """With all pairs near one logit."""
    q, k = call.tensors["q"], call.tensors["k"]
    width = q.shape[-1]
    return call.having(q=1 + q / width, k=(logit + k) / width)


def to_ten_thousand(call: Call) -> Call:
    """With logits of both signs, flat and steep among each other, that any dtype holds: ±10⁴, ±200, ±4, 0."""
    *shape, width = call.tensors["q"].shape
    levels = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0])
    picks = (torch.randint(5, (*shape, 1), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    q, k = (levels[pick].expand(*shape, width).to(call.tensors["q"]) for pick in picks)
    return call.having(q=q, k=k, scale=4 / width)


#: The ends of the sigmoid, and how to get there.
ENDS = {logit: functools.partial(saturated, logit=logit) for logit in (30, -30, 80, -80)} | {10**4: to_ten_thousand}


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


def check_any_shape_and_stride(
    make: Callable[..., Call], shapes: st.SearchStrategy, impl: str, tolerance: float, examples: int
) -> None:
    """``make(*shape, seed=…)`` for any shape, its tensors in any layout that keeps the values."""
    layouts = st.sampled_from([lambda t: t, *(change for name, change in LAYOUTS.items() if "expanded" not in name)])

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(shapes, st.integers(0, 2**31), st.lists(layouts, min_size=4, max_size=4))
    def check(shape, seed, changes):
        call = make(*shape, seed=seed)
        pairs = zip(call.tensors.items(), changes, strict=False)
        assert_as_good_as_eager(call.having(**{name: change(t) for (name, t), change in pairs}), impl, tolerance)

    check()
