"""Tests captured calls of the Grounding DINO encoder: they contain nothing that a CUDA graph cannot hold, and replays
equal the eager call bit for bit. Without a GPU the device and its graphs are pretended (``pretend_cuda``); all else is
the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapted_models import adapt
from pretend_cuda import PretendDevice, PretendGraph, to_device
from torch import Tensor
from torch.utils import _pytree as pytree

import fastcss
from fastcss._one_pass import cuda_graphs
from fastcss._one_pass.shared_work import SharedWork
from fastcss.models.grounding_dino import GroundingDinoEncoder, add_adapters, phrases_to_ids

FUSED = pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])


class RealDevice:
    faults = ()  # a real capture raises if it cannot hold something


@pytest.fixture
def place(device, monkeypatch):
    """Gives the device, real or pretended; its record tells what no graph can hold."""
    if device == "cuda":
        yield RealDevice()
        return
    with PretendDevice() as pretended:
        monkeypatch.setattr(cuda_graphs, "Graph", lambda: PretendGraph(pretended))
        yield pretended


def moved(value, place):
    if isinstance(place, PretendDevice):
        return to_device(value)
    if isinstance(value, torch.nn.Module):
        return value.to("cuda")
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("cuda"), value)


def encoder(place) -> GroundingDinoEncoder:
    return moved(GroundingDinoEncoder.random("tiny"), place)


def adapted(place, tasks: int = 2):
    return moved(add_adapters(GroundingDinoEncoder.random("tiny"), tasks, 4, "swin+fusion"), place)


def given(place, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Make images whose size leaves partial windows, and six phrases; ``seed`` changes both."""
    image = torch.randn(batch, 3, 75, 98, generator=torch.Generator().manual_seed(seed))
    ids = phrases_to_ids()[0].repeat(batch, 1)
    ids[:, 1] += seed
    return moved({"pixel_values": image, "input_ids": ids}, place)


def leaves(output: object) -> list[Tensor]:
    """Return copies, which a later replay does not change."""
    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.fixture
def replaying(monkeypatch) -> Callable:
    """``replaying(runner, inputs)`` returns a call's output, and checks that it was replayed without waits of the
    host."""
    replays = []
    replay = cuda_graphs._replay
    monkeypatch.setattr(cuda_graphs, "_replay", lambda *args: replays.append(args) or replay(*args))

    def call(runner, inputs) -> list[Tensor]:
        before, real = len(replays), inputs["pixel_values"].is_cuda and torch.cuda.is_available()
        if real:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                output = runner(**inputs)
        finally:
            if real:
                torch.cuda.set_sync_debug_mode("default")
        assert len(replays) == before + 1
        return leaves(output)

    return call


def eager(runner, inputs) -> list[Tensor]:
    """Make the same call of the same runner, which has nothing captured now."""
    with torch.no_grad():
        captures, runner._captures = runner._captures, cuda_graphs.Captures()
        try:
            return leaves(runner(**inputs))
        finally:
            runner._captures = captures


@pytest.mark.parametrize(("batch", "fuse"), [(2, True), (1, False)], ids=["fused", "unfused"])
def test_replays_with_a_fixed_text(fuse, batch, place, replaying):
    runner = fastcss.one_pass(adapted(place), fuse=fuse)
    example, other = given(place, batch), given(place, batch, seed=1)
    other["input_ids"] = example["input_ids"]
    runner.capture(**example, fixed=("input_ids",))
    assert list(place.faults) == []
    assert runner.engine == "vmap"
    for inputs in (other, example):
        assert_same_bits(replaying(runner, inputs), eager(runner, inputs))


@FUSED
def test_replays_with_a_text_that_changes(fuse, place, replaying):
    runner = fastcss.one_pass(adapted(place), fuse=fuse)
    example, other = given(place), given(place, seed=1)
    runner.capture(**example)
    assert list(place.faults) == []
    results = [replaying(runner, inputs) for inputs in (other, example)]
    for got, inputs in zip(results, (other, example), strict=True):
        assert_same_bits(got, eager(runner, inputs))
    assert not torch.equal(results[0][1], results[1][1])


def test_graphs_of_another_scale_are_forgotten(place):
    """A scale is a constant of the graph, and changes no tensor that the graph reads."""
    runner, example = fastcss.one_pass(adapted(place)), given(place)
    runner.capture(**example)
    runner.set_scale("task0", 3.0)
    with torch.no_grad():
        got = leaves(runner(**example))
    assert_same_bits(got, eager(runner, example))


@FUSED
def test_replays_of_adapters_that_run_in_turn(fuse, place, replaying):
    runner = fastcss.one_pass(adapted(place), fuse=fuse, engine="replay")
    example, other = given(place), given(place, seed=1)
    runner.capture(**example)
    assert list(place.faults) == []
    assert_same_bits(replaying(runner, other), eager(runner, other))


def test_outputs_of_two_replays_are_copies(place):
    runner = fastcss.one_pass(adapted(place), fuse=True)
    example = given(place)
    runner.capture(**example, fixed=("input_ids",))
    with torch.no_grad():
        first = runner(**example)
        kept = leaves(first)
        second = runner(**{**example, "pixel_values": example["pixel_values"] + 1})
    assert_same_bits(leaves(first), kept)
    assert not torch.equal(first.last_hidden_state_vision, second.last_hidden_state_vision)


def test_what_changed_in_place_is_captured_anew(place, replaying):
    model = adapted(place)
    runner, example = fastcss.one_pass(model, fuse=True), given(place)
    runner.capture(**example, fixed=("input_ids",))
    for changed in ("lora_B", "base_layer.weight", "text_projection"):
        before = replaying(runner, example)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if changed in name:
                    parameter.mul_(1.5)
            runner(**example)
        assert list(place.faults) == [], changed
        after = replaying(runner, example)
        assert not torch.equal(before[0], after[0]), changed
        assert_same_bits(after, eager(runner, example))


def test_a_replay_reads_adapters_where_they_lie(place, replaying):
    """A replay must see even changes that torch does not count: the pack is made within the graph."""
    model = adapted(place)
    runner, example = fastcss.one_pass(model, fuse=True), given(place)
    runner.capture(**example)
    assert list(place.faults) == []
    before = replaying(runner, example)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(1.5)
    after = replaying(runner, example)
    assert not torch.equal(before[0], after[0])
    assert_same_bits(after, eager(runner, example))
    next(m for m in model.modules() if hasattr(m, "lora_A")).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="has hooks, which no replay"):
        runner.capture(**example)


def test_capture_in_inference_mode(place, replaying):
    runner, example = fastcss.one_pass(adapted(place), fuse=True), given(place)
    with torch.inference_mode():
        runner.capture(**example, fixed=("input_ids",))
        assert list(place.faults) == []
        got = replaying(runner, example)
    assert_same_bits(got, eager(runner, example))


@FUSED
def test_the_bare_encoder(fuse, place):
    """An encoder without adapters must replay, captured as the benchmarks do it."""
    model = encoder(place)
    if fuse:
        fastcss.fuse(model)
    example, graph = given(place), cuda_graphs.Graph()
    image = example["pixel_values"].clone()
    constants = SharedWork([example["input_ids"], *model.parameters(), *model.buffers()])

    def call():
        return model(image, example["input_ids"])

    with torch.no_grad():
        with constants:
            graph.warm_up(call)
            output = graph.record(call)
        assert list(place.faults) == []
        image.add_(1)
        graph.replay()
        assert_same_bits(leaves(output), leaves(call()))


@FUSED
def test_what_is_lifted_are_faults(fuse, device):
    """The pretended device must see what a first call does that no graph can hold: only then does "no fault" mean
    anything."""
    if device == "cuda":
        pytest.skip("the pretended device is for machines without one")
    with PretendDevice() as pretended, torch.no_grad():
        runner, example = fastcss.one_pass(adapted(pretended), fuse=fuse), given(pretended)
        runner(**example)
        with pretended.record():
            runner(**example)
    assert "aten._to_copy.default" in pretended.faults  # numbers made into tensors
    assert ("aten._local_scalar_dense.default" in pretended.faults) == (not fuse)  # the check of the levels' sizes


class TwoTensors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, moving, *, kept):
        return self.layer(moving) + kept


def test_a_tensor_that_is_fixed_and_moving(place):
    """If the example has a tensor twice, the fixed place must keep it, and the moving one take what later calls
    give."""
    torch.manual_seed(0)
    sites = {"r": 2, "target_modules": ["layer"]}
    runner = fastcss.one_pass(moved(adapt(TwoTensors(), sites, sites), place))
    x, other = moved(torch.randn(3, 4), place), moved(torch.randn(3, 4), place)
    runner.capture(x, kept=x, fixed=("kept",))
    with torch.no_grad():
        for moving in (other, x):
            assert_same_bits(leaves(runner(moving, kept=x)), eager_of(runner, moving, kept=x))


def eager_of(runner, *args, **kwargs) -> list[Tensor]:
    captures, runner._captures = runner._captures, cuda_graphs.Captures()
    try:
        return leaves(runner(*args, **kwargs))
    finally:
        runner._captures = captures
