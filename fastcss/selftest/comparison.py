"""Compares a call of an op with the float64 reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

# A result may be so much further from the float64 reference than the literal eager code of the same dtype, as a
# fraction of the reference. This holds both in the 2-norm of the tensor and in its largest element.
TOLERANCES = {
    torch.float64: 1e-14,  # allows another order of the same sums
    torch.float32: 1e-6,  # allows another order of the same sums: a few units in the last place, 6e-8
    torch.float16: 2.5e-4,  # is half a unit roundoff (2⁻¹¹), which one rounding of the result costs on average
    torch.bfloat16: 2e-3,  # is the same for 2⁻⁸
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """Holds one call of an op: the tensors it is differentiated in, and its other arguments."""

    op: Callable
    tensors: dict[str, Tensor]
    options: dict = dataclasses.field(default_factory=dict)

    def having(self, **changes) -> Call:
        """Return the call with other tensors or other options."""
        tensors = {name: changes.pop(name, tensor) for name, tensor in self.tensors.items()}
        return Call(self.op, tensors, self.options | changes)

    def leaves(self, dtype: torch.dtype | None = None) -> Call:
        """Return the call on new leaves that require gradients and have the same strides."""
        return self.having(**{n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in self.tensors.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with every tensor changed, also those that need no gradient (labels)."""
        options = {n: change(v) if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return Call(self.op, {n: change(t) for n, t in self.tensors.items()}, options)

    def __call__(self, impl: str) -> tuple[Tensor, ...]:
        return tuple(self.outputs(impl).values())

    def outputs(self, impl: str) -> dict[str, Tensor]:
        """Return the outputs by name: the names of a named tuple, or that of the op."""
        results = self.op(**self.tensors, **self.options, impl=impl)
        if isinstance(results, Tensor):
            return {self.op.__name__: results}
        return dict(zip(getattr(results, "_fields", ("intra", "inter")), results, strict=True))

    def output_gradients(self) -> tuple[Tensor, ...]:
        """Draw random gradients that the dtype of the call can hold; zeros for an output that has no gradient."""
        dtype = next(iter(self.tensors.values())).dtype
        outputs = self.leaves()("reference")
        gradients = (normal(*y.shape, seed=9 + i, dtype=dtype, device=y.device) for i, y in enumerate(outputs))
        return tuple(dy if y.requires_grad else 0 * dy for y, dy in zip(outputs, gradients, strict=True))

    def results(self, impl: str, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the outputs and, if they can be differentiated, the gradient of every tensor."""
        outputs, found = self.outputs(impl), {}
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs.values(), gradients, strict=True) if y.requires_grad]
        if pairs:
            leaves = list(self.tensors.values())
            differentiable, dys = zip(*pairs, strict=True)
            grads = torch.autograd.grad(differentiable, leaves, dys, materialize_grads=True)
            found = {f"d{name}": grad for name, grad in zip(self.tensors, grads, strict=True)}
        return {name: y.detach() for name, y in outputs.items()} | found


#: Says by which tensors an error of ``name`` is divided: ``(name, exact, gradients) → tensors``; the largest counts.
Peers = Callable[[str, dict[str, Tensor], tuple[Tensor, ...]], list[Tensor]]


def assert_as_good_as_eager(
    call: Call,
    impl: str,
    tolerance: float,
    *,
    gradients: tuple[Tensor, ...] | None = None,
    peers: Peers = lambda name, exact, dys: [exact[name]],
    rounded: bool = False,
) -> None:
    """Assert that values and gradients are no further from the float64 reference than those of the literal eager code,
    and that indices and counts equal the reference's.

    ``rounded`` also allows for inputs that are off by a rounding. If two terms nearly cancel, the eager code may be
    accidentally exact in a few elements.
    """
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
                size = max(_norm(peer, order) for peer in sized) or 1.0
                theirs, error = (_norm(x[name] - want, order) / size for x in (eager, ours))
                if not math.isfinite(theirs):  # an intermediate value of the eager code overflows 16 bits
                    theirs = 0.0
                # Chance errors average out over many elements, not over a few.
                limit = 1.2 * theirs + tolerance * (1 if want.numel() >= 32 else 2)
                if rounded and not error <= limit:
                    limit += tolerance + 1.2 * _norm(_off_by_a_rounding(call, dys)[name] - want, order) / size
                assert math.isfinite(limit), (name, order)  # otherwise nothing would be tested
                assert error <= limit, f"{name}: {error:.1e} of the reference off, {limit:.1e} allowed (norm {order})"


def _norm(tensor: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(tensor, order, dtype=torch.float64).item()


def _off_by_a_rounding(call: Call, dys: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the float64 reference for inputs and gradients that are each off by a rounding, up or down."""

    def moved(tensor: Tensor, seed: int) -> Tensor:
        sign = normal(*tensor.shape, seed=seed, dtype=torch.float64, device=tensor.device).sign()
        return tensor.double() * (1 + torch.finfo(tensor.dtype).eps / 2 * sign)

    tensors = {name: moved(tensor, seed) for seed, (name, tensor) in enumerate(call.tensors.items())}
    return call.having(**tensors).leaves().results("reference", tuple(moved(dy, 9 + i) for i, dy in enumerate(dys)))
