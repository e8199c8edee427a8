"""Every op under every transform of torch and every pair of them, against what they mean by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import op_calls
import pytest
import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastcss import PackedLora, multi_lora
from fastcss.ops import cost_filter, scatter_cost

# --- transforms: of a function of tensors that returns one tensor, into another such function ------------------------

Function = Callable[..., Tensor]
#: ``forward`` or ``backward``.
Direction = Callable[[Function, Sequence[Tensor]], tuple[Tensor, ...]]


class Transform(NamedTuple):
    """Pairs what torch does with what that means in plain calls and first derivatives of torch.autograd."""

    by_torch: Callable[[Function, Sequence[Tensor]], Function]
    by_hand: Callable[[Function, Sequence[Tensor]], Function]


def compiled(f: Function, _) -> Function:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


def exported(f: Function, tensors: Sequence[Tensor]) -> Function:
    return torch.export.export(_Calls(f), tuple(tensors)).module()


def in_functional_call(f: Function, tensors: Sequence[Tensor]) -> Function:
    module = _Holds(f, [torch.zeros_like(t) for t in tensors])

    def call(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(module, {f"tensor_{i}": t for i, t in enumerate(tensors)}, ())

    return call


def checkpointed(f: Function, _) -> Function:
    return lambda *tensors: checkpoint(f, *tensors, use_reentrant=False)


def mapped(f: Function, _) -> Function:
    return lambda *tensors: torch.vmap(f)(*map(_two, tensors))


def in_a_loop(f: Function, _) -> Function:
    return lambda *tensors: torch.stack([f(*one) for one in zip(*map(_two, tensors), strict=True)])


def gradient(f: Function, _) -> Function:
    def call(*tensors: Tensor) -> Tensor:
        by = tuple(range(len(tensors)))
        return _flat(torch.func.grad(lambda *t: f(*t).square().sum(), by)(*tensors))

    return call


def gradient_by_hand(f: Function, _) -> Function:
    def call(*tensors: Tensor) -> Tensor:
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            return _flat(_grads(f(*leaves).square().sum(), leaves, create_graph=True))

    return call


def tangent(f: Function, _) -> Function:
    return lambda *tensors: torch.func.jvp(f, tensors, tuple(map(torch.cos, tensors)))[1]


def tangent_by_hand(f: Function, _) -> Function:
    """The gradient by v of the gradient ``vᵀ J``, along the direction."""

    def call(*tensors: Tensor) -> Tensor:
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = f(*leaves)
            v = torch.zeros_like(y, requires_grad=True)
            along = sum(
                (g * t.cos()).sum() for g, t in zip(_grads(y, leaves, v, create_graph=True), leaves, strict=True)
            )
            return _grads(along, [v], create_graph=True)[0]

    return call


def same(f: Function, _) -> Function:
    return f


TRANSFORMS = {
    "compile": Transform(compiled, same),
    "export": Transform(exported, same),
    "vmap": Transform(mapped, in_a_loop),
    "grad": Transform(gradient, gradient_by_hand),
    "jvp": Transform(tangent, tangent_by_hand),
    "functional_call": Transform(in_functional_call, same),
    "checkpoint": Transform(checkpointed, same),
}


class _Calls(nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.f(*tensors)


class _Holds(nn.Module):
    def __init__(self, f: Function, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.f, self.count = f, len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"tensor_{i}", tensor)

    def forward(self) -> Tensor:
        return self.f(*(getattr(self, f"tensor_{i}") for i in range(self.count)))


def _two(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor.roll(1, -1)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _grads(y: Tensor, leaves: Sequence[Tensor], *args, **kwargs) -> tuple[Tensor, ...]:
    if not y.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(y, leaves, *args, materialize_grads=True, **kwargs)


# --- ops: small calls, as a function of their tensors ----------------------------------------------------------------

#: Name → a call of a few elements a side: the name starts with that of the op, or is that of what goes on from one.
SHAPES = {op: drawn.small for op, drawn in op_calls.OPS.items() if op not in ("packed_filter", "multi_lora")} | {
    "scatter_cost": op_calls.OPS["cost_filter"].small,
    "multi_lora shared": ("shared", [4], 6, 5, [2, 0, 3]),
    "multi_lora diverged": ("diverged", [2, 2], 6, 5, [2, 0, 3]),
    "multi_lora routed": op_calls.OPS["multi_lora"].small,
}

#: The op by whose name another one is refused.
ERRORS = {"scatter_cost": "cost_filter"}


def scattered(image: Tensor, text: Tensor, *, k: int, impl: str) -> Tensor:
    return scatter_cost(cost_filter(image, text, k, impl=impl), text.shape[0], fill=-1.0)


def make(op: str) -> op_calls.Call:
    if op == "scatter_cost":
        return dataclasses.replace(op_calls.OPS["cost_filter"].make(*SHAPES[op], shared=True), op=scattered)
    return op_calls.OPS[op.split()[0]].make(*SHAPES[op])


def function(op: str, impl: str) -> tuple[Function, tuple[Tensor, ...]]:
    """The sum of the squares of all results, and the tensors."""
    call = make(op)
    names, run, options = tuple(call.tensors), call.op, dict(call.options)
    if op.startswith("multi_lora"):  # dataclasses.replace is nothing that torch 2.10 compiles
        pack = options.pop("packed")

        def run(x, weight, a, b, bias=None, **options):
            return multi_lora(x, weight, PackedLora(a, b, pack.ranks, pack.offsets, pack.scales), bias, **options)

    def f(*tensors: Tensor) -> Tensor:
        results = run(**dict(zip(names, tensors, strict=True)), **options, impl=impl)
        results = (results,) if isinstance(results, Tensor) else results
        return sum(y.square().sum() for y in results if y.is_floating_point())

    return f, tuple(call.tensors.values())


# --- the table -------------------------------------------------------------------------------------------------------


def transformed(names: Sequence[str], f: Function, tensors: Sequence[Tensor], by: str) -> Function:
    for name in reversed(names):
        f = getattr(TRANSFORMS[name], by)(f, tensors)
    return f


def forward(f: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (_values(f(*(t.detach().clone() for t in tensors))).detach(),)


def backward(f: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return _grads(_values(f(*leaves)).square().sum(), leaves)


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
        with _left_as_found():
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
        with _left_as_found():
            got, want = (direction(transformed(names, _product, _MATRICES, by), _MATRICES) for by in Transform._fields)
        return all(map(_near, got, want))
    except Exception:
        return False


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).tanh().square().sum()


_MATRICES = (torch.tensor([[0.3, -0.2, 0.5]]), torch.tensor([[0.1], [0.7], [-0.4]]))


@contextlib.contextmanager
def _left_as_found() -> Iterator[None]:
    """torch's compiler leaves the levels of torch.func that it was in when it failed."""
    torch.compiler.reset()
    try:
        yield
    finally:
        while torch._C._functorch.peek_interpreter_stack() is not None:
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
        forward_ad._current_level, eager_transforms.JVP_NESTING = -1, 0
        with contextlib.suppress(RuntimeError):  # none was left
            torch._C._exit_dual_level(level=0)


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


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", [op for op in SHAPES if op not in ("merge_masks", "topk_queries", "top_classes")])
def test_tangents_of_a_kernel_are_refused(op, compile):
    """A kernel that is asked for must refuse tangents by name; torch would give zeros."""
    f, tensors = function(op, "cpu")
    run = tangent(f, tensors)
    with (
        _left_as_found(),
        pytest.raises(Exception, match=rf"{ERRORS.get(op, op.split()[0])}: .*no forward-mode .*impl='composed'"),
    ):
        (compiled(run, tensors) if compile else run)(*tensors)


@pytest.mark.parametrize("op", [op for op in SHAPES if op not in ("merge_masks", "topk_queries", "top_classes")])
def test_dual_numbers_of_a_kernel_are_refused(op):
    """Dual numbers must be refused without torch.func, too, whose levels the test above has."""
    f, tensors = function(op, "cpu")
    name = ERRORS.get(op, op.split()[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"{name}: .*no forward-mode"):
        f(*(forward_ad.make_dual(t, t) if t.is_floating_point() else t for t in tensors))
