"""Every op, and the models that run on them, called from 8 Python threads at once: the bits of a call alone."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable

import checks
import pytest
import torch
from adapted_models import adapt, build_adapted, inputs, loop, vit
from calls import runs
from fused_models import encoder, encoder_inputs
from op_calls import OPS, example
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastcss

THREADS, TIMES = 8, 2


def at_once(work: Callable[[int], None]) -> None:
    """``work(i)`` in each of the threads, all of which begin together."""
    start, failures = threading.Barrier(THREADS), []

    def run(i: int) -> None:
        try:
            start.wait(timeout=60)
            for _ in range(TIMES):
                work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("op", OPS)
def test_one_op(op):
    runs("cpu", "cpu")
    call = example(op)
    gradients = call.output_gradients()
    want = call.leaves().results("cpu", gradients)
    at_once(lambda i: checks.assert_bitwise(call.leaves().results("cpu", gradients), want))


def test_all_ops():
    """Another one in each thread, in turn: what one keeps from call to call is in nobody's way."""
    runs("cpu", "cpu")
    calls = {op: example(op, torch.bfloat16) for op in OPS}
    gradients = {op: call.output_gradients() for op, call in calls.items()}
    want = {op: call.leaves().results("cpu", gradients[op]) for op, call in calls.items()}

    def work(i: int) -> None:
        for op in itertools.islice(itertools.cycle(OPS), 2 * i, 2 * i + len(OPS)):
            checks.assert_bitwise(calls[op].leaves().results("cpu", gradients[op]), want[op])

    at_once(work)


def floats(output: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("kind", ["one_pass", "fuse"])
def test_one_model(kind, one_thread):
    """A model of several tasks, or on fused ops, must give the same outputs and image gradient in any thread."""
    if kind == "one_pass":
        model, given = fastcss.one_pass(build_adapted(vit)), inputs(vit, 2)
    else:
        model, given = encoder().eval(), encoder_inputs(1)
        assert fastcss.fuse(model).replaced

    def results() -> list[Tensor]:
        image = given["pixel_values"].clone().requires_grad_()
        outputs = [output for output in floats(model(**given | {"pixel_values": image})) if output.requires_grad]
        return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), image)]

    cold = [[] for _ in range(THREADS)]
    at_once(lambda i: cold[i].append(results()))  # also its first call, which measures one task before it runs them all
    want = results()
    assert len(want) > 1
    for found in itertools.chain(*cold):
        torch.testing.assert_close(found, want)

    def work(_: int) -> None:
        for one, other in zip(results(), want, strict=True):
            assert torch.equal(one, other)

    at_once(work)


@torch.no_grad()
def test_a_runner_whose_adapters_have_just_changed():
    """None of the threads may run before the one that found the change has told the layers of it."""
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(4, 4)), *({"r": 2, "target_modules": ["0"]} for _ in range(3)))
    runner, x = fastcss.one_pass(model), torch.randn(2, 4)
    weight = next(p for name, p in model.named_parameters() if "lora_B.task1" in name)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(40):
            weight.data.copy_(torch.randn_like(weight))
            want = torch.stack(loop(model, {"input": x}))
            at_once(
                torch.no_grad()(lambda _, want=want: torch.testing.assert_close(runner(x), want, atol=1e-5, rtol=0))
            )
    finally:
        sys.setswitchinterval(interval)
