"""Arguments that are none, one or two at a time: an error that names the op and an argument, or a result; no crash."""

from __future__ import annotations

import inspect

import pytest
import torch
from arguments import ARGUMENTS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastcss import PackedLora, ops

LORA = PackedLora.pack([torch.ones(2, 7)] * 2, [torch.ones(5, 2)] * 2, [1.0, 1.0])
KEPT = ops.FilteredCost(torch.ones(2, 3, 4), torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.ones(2, 3))
OTHERS = {
    "multi_lora": {"x": torch.ones(3, 7), "weight": torch.ones(5, 7), "lora": LORA, "bias": None, "index": None},
    "pack_text": {"text": torch.ones(6, 2, 5)},
    "top_classes": {"score": torch.ones(2, 5), "k": 2},
    "scatter_cost": {"filtered": KEPT, "classes": 5, "fill": -100.0},
    "filtered_argmax": {"filtered": KEPT},
}


def defaults(op: str) -> dict:
    """Return the defaults of the options that ``ARGUMENTS`` leaves out."""
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "impl"}


ALL = {op: defaults(op) | given for op, given in (ARGUMENTS | OTHERS).items()}
ANYTHING = [None, "x", 3, 0, -1, 2.5, float("nan"), float("inf"), 2**70, -(2**70), True, (), (1, 2), [1, 2], {}]
ANYTHING += [object(), torch.ones(()), torch.ones(0), torch.ones(1, 1, 1, 1, 1, 1, 1)]


def others(value: object) -> list:
    """List what may stand in the place of ``value``."""
    if isinstance(value, PackedLora | ops.FilteredCost):
        fields = vars(value) if isinstance(value, PackedLora) else value._asdict()
        return ANYTHING + [type(value)(**fields | {name: wrong}) for name in fields for wrong in others(fields[name])]
    if not isinstance(value, Tensor):
        return ANYTHING
    dtypes = (torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64)
    shapes = [value[:0], value[None], value[..., :0], torch.cat([value, value]), value.flatten(), value.movedim(-1, 0)]
    kinds = [value.to_sparse(), value.to("meta"), torch.nested.nested_tensor([value.float()]), value.numpy()]
    kinds += [value.tolist(), torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)]
    return ANYTHING + [value.to(dtype) for dtype in dtypes] + shapes + kinds


def assert_refused_or_right(op: str, impl: str, arguments: dict) -> None:
    """float64, or a tensor without memory, is refused by the implementation that was asked for."""
    chosen = {} if op in ("scatter_cost", "filtered_argmax") else {"impl": impl}
    refusal = None
    try:
        getattr(ops, op)(**arguments, **chosen)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        refusal = error
    if refusal is not None:
        message = str(refusal)
        named = message.startswith(f"{op}: ") and any(name in message for name in arguments)
        assert named or (isinstance(refusal, RuntimeError) and "cannot run" in message), repr(refusal)


def test_every_op_is_here():
    assert {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)} == ALL.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested and quantized tensors are new to torch, or old
@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("impl", ["reference", "composed", "cpu"])
def test_one_argument(impl, op):
    for name, value in ALL[op].items():
        for wrong in others(value):
            assert_refused_or_right(op, impl, ALL[op] | {name: wrong})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", [op for op, arguments in ALL.items() if len(arguments) > 1])
def test_two_arguments(op, fuzz):
    names = st.lists(st.sampled_from(sorted(ALL[op])), min_size=2, max_size=2, unique=True)

    @fuzz(1)
    @given(names, st.data())
    def check(names, data):
        wrong = {name: data.draw(st.sampled_from(others(ALL[op][name])), name) for name in names}
        assert_refused_or_right(op, "cpu", ALL[op] | wrong)

    check()
