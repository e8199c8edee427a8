"""Tests pools of adapter folders: each answer against PEFT with that adapter alone, whatever is paged in and out."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from pool_models import COUNT, arena, needs, routes

import fastcss
from fastcss._one_pass.adapter_pool import AdapterPool


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_each_answer_is_pefts_and_its_bits_do_not_depend_on_what_is_in_memory(kept, engine):
    """The smaller budget is the least with which every call can run, to the byte."""
    everything = kept.pool(engine=engine)
    least = max(needs(everything, route) for route in routes())
    pool, memory = kept.pool(least, engine=engine), []
    first: dict = {}
    for route in routes():
        got = pool(**kept.given, route=route)
        kept.check(got, route)
        assert torch.equal(got, everything(**kept.given, route=route))
        for i, name in enumerate(route):
            assert torch.equal(first.setdefault((i, name), got[i]), got[i])
        memory.append(arena(pool).memory.data_ptr())
        assert set(filter(None, route)) <= set(pool.resident)
    assert everything.loads == COUNT < pool.loads
    assert len(set(memory)) == 1
    assert arena(pool).memory.numel() * 4 <= least
    assert pool.engine == engine


@torch.no_grad()
def test_the_least_recently_used_goes_and_nothing_in_memory_is_read_again(kept):
    pool = kept.pool()
    pool = kept.pool(needs(pool, ["task0", "task1", "task5", "task6"]))
    for route in (["task0"], ["task1"], ["task0"]):
        pool(**{key: value[:1] for key, value in kept.given.items()}, route=route)
    assert pool.resident == ("task1", "task0")
    assert pool.loads == 2
    pool(**kept.given, route=["task5", "task6", None, "task5"])
    assert pool.resident == ("task1", "task0", "task5", "task6")
    assert pool.loads == 4
    pool(**kept.given, route=["task2", None, "task0", "task0"])
    assert "task1" not in pool.resident
    assert "task0" in pool.resident
    assert pool.loads == 5


@torch.no_grad()
def test_prefetch_reads_beside_the_calls(kept):
    pool = kept.pool()
    pool.prefetch(["task3", None, "task1", "task3"])
    pool._ahead.submit(lambda: None).result()
    assert pool.resident == ("task3", "task1")
    assert pool.loads == 2
    route = ["task1", "task3", None, "task1"]
    kept.check(pool(**kept.given, route=route), route)
    assert pool.loads == 2
    # There is room for two: the first two are read, and not thrown out for the third.
    pool = kept.pool(needs(pool, ["task7", "task2"]))
    pool.prefetch(["task2", "task7", "task1"])
    pool._ahead.submit(lambda: None).result()
    assert pool.resident == ("task2", "task7")
    pool.prefetch(["task1"])
    pool._ahead.submit(lambda: None).result()
    assert pool.resident == ("task7", "task1")
    with pytest.raises(KeyError, match="no adapter 'task33'; there are task3"):
        pool.prefetch(["task33"])


@torch.no_grad()
def test_threads_wait_for_room_and_get_their_own_answers(kept):
    """Two threads with disjoint adapters, in a pool that holds those of one call; each is right, and both end."""
    pool = kept.pool()
    mine = [[f"task{t}" for t in (0, 2, 4, 6)], [f"task{t}" for t in (1, 3, 5, 7)]]
    pool, wrong = kept.pool(max(needs(pool, route) for route in mine)), []

    def work(route):
        for turn in range(15):
            turned = route[turn % 4 :] + route[: turn % 4]
            try:
                with torch.no_grad():
                    kept.check(pool(**kept.given, route=turned), turned)
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=work, args=(route,)) for route in mine * 2]
    [thread.start() for thread in threads]
    [pool.prefetch(mine[i % 2]) for i in range(10)]
    [thread.join(60) for thread in threads]
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    assert not any(block.users for block in arena(pool)._places.blocks.values())


@torch.no_grad()
def test_what_does_not_fit_the_budget_is_said_with_figures(kept):
    pool = kept.pool()
    route = ["task0", "task1", "task2", "task6"]
    need = needs(pool, route)
    with pytest.raises(ValueError, match=rf"the 4 adapters of this call take .* MiB together.*budget={need:,} or more"):
        kept.pool(need - 4)(**kept.given, route=route)
    kept.check(kept.pool(need)(**kept.given, route=route), route)
    with pytest.raises(ValueError, match=r"budget is 0.0 MiB, and adapter 'task\d' alone takes .* bytes"):
        kept.pool(100)
    for budget in (0, -1, 1.5, True, "2 GiB"):
        with pytest.raises(ValueError, match="budget must be a whole number of bytes above 0"):
            kept.pool(budget)


@torch.no_grad()
def test_bad_calls(kept):
    pool = kept.pool()
    with pytest.raises(KeyError, match=r"AdapterPool: no adapter 'tsk3'; there are task3, "):
        pool(**kept.given, route=["task0", "tsk3", None, None])
    with pytest.raises(TypeError, match="route must hold adapters' names, or None, got 3 for sample 1"):
        pool(**kept.given, route=["task0", 3, None, None])
    with pytest.raises(TypeError, match="route must be a list of adapters' names, or None, got Tensor"):
        pool(**kept.given, route=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no input has a batch of that length"):
        pool(**kept.given, route=["task0"])
    with pytest.raises(ValueError, match="9 folders and 9 names, 'a' twice"):
        kept.pool(names=["a"] * COUNT)
    with pytest.raises(ValueError, match="has adapters already; it wants the bare model"):
        AdapterPool(kept.model, kept.folders, budget=1 << 20)
    kept.bare.train()
    try:
        with pytest.raises(RuntimeError, match="training mode, and a pool is for inference"):
            pool(**kept.given, route=["task0"] * 4)
    finally:
        kept.bare.eval()
    assert pool.loads == 1  # of the call whose route was too short


@torch.no_grad()
def test_a_pool_is_copied_with_its_model_and_is_the_models_module(kept):
    pool, route = kept.pool(names=[f"n{t}" for t in range(COUNT)]), ["n0", "n2", None, "n4"]
    want = pool(**kept.given, route=route)
    assert set(pool.state_dict()) == {f"model.{key}" for key in kept.bare.state_dict()}
    for made in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert made.model is not pool.model
        assert made.resident == ()
        assert made.adapters == pool.adapters
        assert torch.equal(made(**kept.given, route=route), want)
    saved_weight = pool.model.value.weight.clone()
    pool.model.value.weight.mul_(2)  # the model's own values are followed
    assert not torch.equal(pool(**kept.given, route=route), want)
    pool.model.value.weight.copy_(saved_weight)
    pool.model.value.requires_grad_(False)
    assert torch.equal(pool(**kept.given, route=route), want)


def test_a_call_inside_of_a_call(kept):
    pool = kept.pool()
    pool = kept.pool(needs(pool, ["task7"]))
    with arena(pool).holding([7]), pytest.raises(RuntimeError, match="a call inside of another call"):
        pool(**kept.given, route=["task0"] * 4)


@torch.no_grad()
def test_names_in_a_runners_route(kept):
    runner = fastcss.one_pass(kept.model)
    route = ["task3", None, "task0", "task3"]
    got = runner(**kept.given, route=route)
    assert torch.equal(got, runner(**kept.given, route=torch.tensor([3, -1, 0, 3])))
    kept.check(got, route)
    with pytest.raises(KeyError, match="one_pass: no adapter 'task99'; there are task"):
        runner(**kept.given, route=["task99"] * 4)
    with pytest.raises(TypeError, match="route must hold adapters' names, or None, got 0 for sample 0"):
        runner(**kept.given, route=[0, 1, 0, 1])
