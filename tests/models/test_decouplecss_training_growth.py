"""Tests that learning a task costs the same however many there are already; work and memory are counted, not timed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from decouplecss_models import build, pictures
from torch.utils.flop_counter import FlopCounterMode
from training_scenes import trainer_for

from benchmarks import decouplecss_training, measure

pytestmark = pytest.mark.usefixtures("one_thread")
#: Peaks may differ by so many bytes, since Python may free a small tensor later; a task takes over 50 times as many.
SLACK = 2048


class Cost(NamedTuple):
    """Holds the FLOPs of products, all that was allocated (bytes and number), and the most bytes held at a time."""

    flops: int
    allocated: int
    allocations: int
    peak: int


def cost(run: Callable[[], object]) -> Cost:
    """Measure what a call costs; memory that compiled ops allocate for themselves counts, too."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    gc.collect()
    gc.disable()  # otherwise the peak would depend on when the collector happens to run
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    finally:
        gc.enable()
    sizes = measure.allocations(profile)
    allocated = [size for size in sizes if size > 0]
    return Cost(counter.get_total_flops(), sum(allocated), len(allocated), max(itertools.accumulate(sizes)))


def training(tasks: int) -> Cost:
    """Measure an epoch of the newest task: reading pictures, losses, gradients, AdamW."""
    trainer = trainer_for((1,) * (tasks - 1) + (2,), epochs=3)
    trainer.run_epoch()  # makes AdamW's moments and whatever is kept from one call to the next
    return cost(trainer.run_epoch)


def segmenting(tasks: int) -> Cost:
    model, given = build((2,) * tasks), pictures(1)
    model.segment(**given)
    return cost(lambda: model.segment(**given))


def test_an_epoch_costs_the_same_after_one_task_and_after_seven():
    one = training(1)
    assert one.flops > 0
    assert one.allocations > 1000
    assert sum(p.nbytes for p in trainer_for((2,)).task.parameters()) > 50 * SLACK
    for more in (training(4), training(8)):
        assert more[:3] == one[:3]
        assert abs(more.peak - one.peak) <= SLACK


def test_what_runs_all_tasks_would_be_seen_to_grow():
    assert all(four > one for one, four in zip(segmenting(1), segmenting(4), strict=True))


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_benchmark_compares_with_a_model_of_one_task(tasks):
    model = decouplecss_training.random_model(decouplecss_training.TINY | {"T": tasks, "classes": 2})
    alone = decouplecss_training.last_task_alone(model)
    assert (len(model.tasks), len(alone.tasks)) == (tasks, 1)
    assert list(alone.detector.peft_config) == [alone.tasks[0].name] == [model.tasks[-1].name]
    whole, rest = dict(model.named_parameters()), dict(alone.named_parameters())
    adapters = [name for name in rest if ".lora_" in name]
    assert len(adapters) * tasks == sum(".lora_" in name for name in whole)
    assert all(torch.equal(rest[name], whole[name]) for name in adapters)
    generator = dict(model.tasks[-1].generator.named_parameters())
    assert all(torch.equal(p, generator[name]) for name, p in alone.tasks[0].generator.named_parameters())
