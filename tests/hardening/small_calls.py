"""Makes of every op a function of its tensors, of a few elements each, for transforms and tracers."""

from __future__ import annotations

import dataclasses

import op_calls
from torch import Tensor
from torch_transforms import Function

from fastcss import PackedLora, multi_lora
from fastcss.ops import cost_filter, scatter_cost

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
