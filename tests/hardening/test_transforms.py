"""Every op under every transform of torch and every pair of them, against what they mean by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from small_calls import ERRORS, SHAPES, function
from torch import Tensor
from torch_transforms import TRANSFORMS, Direction, Function, Transform, grads, left_as_found


def transformed(names: Sequence[str], f: Function, tensors: Sequence[Tensor], by: str) -> Function:
    for name in reversed(names):
        f = getattr(TRANSFORMS[name], by)(f, tensors)
    return f


def forward(f: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (_values(f(*(t.detach().clone() for t in tensors))).detach(),)


def backward(f: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return grads(_values(f(*leaves)).square().sum(), leaves)


def _values(y: Tensor) -> Tensor:
    if type(y) is not Tensor:  # torch.export of torch.func gives such, with plain ops, too
        raise TypeError(f"a {type(y).__name__} has no values")
    return y


def outcome(op: str, names: tuple[str, ...], direction: Direction, impl: str = "auto") -> str:
    """Say in a word what comes of a transform of ``op``:

    - "exact";
    - "refused", by an error that names the op;
    - "torch", where torch itself fails, at a plain product or at the torch ops that the op is composed of;
    - else what is wrong.
    """
    f, tensors = function(op, impl)
    try:
        want = by_hand(op, names, direction)
    except RuntimeError:  # no second derivative: torch 2.10 has none of grid_sample
        return "torch"
    try:
        with left_as_found():
            got = direction(transformed(names, f, tensors, "by_torch"), tensors)
    except Exception as error:
        if f"{ERRORS.get(op, op.split()[0])}: " in _all_of(error):
            return "refused"
        if impl == "auto" and outcome(op, names, direction, "composed") != "exact":
            return "torch"
        return f"{type(error).__name__}: {error}"
    for one, other in zip(got, want, strict=True):
        if not _near(one, other):
            return f"wrong: {float(one.norm()):.6g}, by hand {float(other.norm()):.6g}"
    return "exact"


@functools.cache
def by_hand(op: str, names: tuple[str, ...], direction: Direction) -> tuple[Tensor, ...]:
    f, tensors = function(op, "composed")
    return direction(transformed(names, f, tensors, "by_hand"), tensors)


@functools.cache
def torch_can(names: tuple[str, ...], direction: Direction) -> bool:
    """torch's own ops are exact there: torch.export of torch.func.grad, say, gives a tensor without values."""
    try:
        with left_as_found():
            got, want = (direction(transformed(names, _product, _MATRICES, by), _MATRICES) for by in Transform._fields)
        return all(map(_near, got, want))
    except Exception:
        return False


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).tanh().square().sum()


_MATRICES = (torch.tensor([[0.3, -0.2, 0.5]]), torch.tensor([[0.1], [0.7], [-0.4]]))


def _near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().amax() <= 1e-4 * want.abs().amax() + 1e-6) if want.numel() else True


def _all_of(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{_all_of(error.__cause__ or error.__context__)}"


SINGLE = [(name,) for name in TRANSFORMS]
PAIRS = list(itertools.product(TRANSFORMS, repeat=2))
PER_SAMPLE = ("compile", "vmap", "grad")
TRACED = {"compile", "export"}


def cases(op: str, every: bool) -> list[tuple[tuple[str, ...], Direction]]:
    """All; or all that nothing is traced for, those in which torch lost gradients, and a share of the others."""
    all_of_them = list(itertools.product((*SINGLE, *PAIRS, PER_SAMPLE), (forward, backward)))
    if every:
        return all_of_them
    always = [(("compile", "grad"), forward), (PER_SAMPLE, forward), (("export",), backward)]
    traced = [case for case in all_of_them if TRACED & set(case[0]) and case not in always]
    share = traced[list(SHAPES).index(op) :: len(SHAPES)]
    return [case for case in all_of_them if case not in traced or case in share]


@pytest.mark.parametrize("op", SHAPES)
def test_exact_or_an_error_that_names_the_op(op, pytestconfig, record_table):
    """``--all-transforms`` tries every pair for every op, and prints what came of it."""
    every = pytestconfig.getoption("--all-transforms")
    found = {
        (".".join(names), direction.__name__): outcome(op, names, direction) if torch_can(names, direction) else "torch"
        for names, direction in cases(op, every)
    }
    if every:
        for pair, came in found.items():
            if came != "exact":
                record_table(f"transforms of {op}, not exact", {"of": pair[0], "pass": pair[1], "": came[:100]})
    assert not {pair: came for pair, came in found.items() if came not in ("exact", "refused", "torch")}
