"""Tests pools of adapter folders: each answer against PEFT with that adapter alone, whatever is paged in and out."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading

import peft
import pytest
import torch
from adapted_models import adapt, edit_config, save
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastcss
from fastcss._one_pass.adapter_pool import AdapterPool

COUNT, BATCH = 9, 4
SITES = (["query", "value"], ["value", "patch"], ["query", "words", "head"], ["patch"], ["head", "words"])


class Small(nn.Module):
    """Has one layer of every kind, the widths of which share no divisor."""

    def __init__(self):
        super().__init__()
        self.words, self.patch = nn.Embedding(11, 6), nn.Conv2d(3, 6, 2, stride=2)
        self.query, self.value, self.head = nn.Linear(6, 7), nn.Linear(6, 7), Conv1D(5, 7)

    def forward(self, pixels, ids):
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.words(ids)[:, None].mean(2)
        return self.head(torch.tanh(self.query(x)) * self.value(x))


class Saved:
    """A bare model, PEFT's with nine adapters that differ in layers, ranks and scales, and their folders."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.bare = Small().eval()
        options = [{"target_modules": SITES[t % 5], "r": 1 + t % 4, "use_rslora": t % 2 == 0} for t in range(COUNT)]
        self.model = adapt(copy.deepcopy(self.bare), *options)
        self.folders = save(self.model, folder)
        self.given = {"pixels": torch.randn(BATCH, 3, 4, 4), "ids": torch.randint(11, (BATCH, 3))}
        with torch.no_grad():
            self.alone = {name: self.run(name) for name in (None, *self.model.peft_config)}

    def run(self, name):
        """PEFT's outputs with one adapter, for every sample as a batch of one."""
        samples = [{key: value[i : i + 1] for key, value in self.given.items()} for i in range(BATCH)]
        if name is None:
            with self.model.disable_adapter():
                return torch.cat([self.model(**sample) for sample in samples])
        self.model.set_adapter(name)
        return torch.cat([self.model(**sample) for sample in samples])

    def check(self, got, route):
        for i, name in enumerate(route):
            want = self.alone[name][i]
            assert (got[i] - want).abs().max() <= 1e-5 * want.abs().max(), (i, name)

    def pool(self, budget=1 << 20, **options):
        return AdapterPool(self.bare, self.folders, budget=budget, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def saved(kept, tmp_path):
    """The same with folders of its own, to be changed."""
    mine = copy.copy(kept)
    mine.folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in kept.folders]
    return mine


def arena(pool):
    return pool._state[0].arena


def needs(pool, route):
    return arena(pool).bytes_of(sorted({pool.adapters.index(name) for name in route if name}))


def routes(count=40):
    names = [None, *(f"task{t}" for t in range(COUNT))]
    draws = torch.randint(len(names), (count, BATCH), generator=torch.Generator().manual_seed(1))
    return [[names[t] for t in draw] for draw in draws.tolist()]


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
def test_a_folder_that_changes_is_refused_by_name_and_the_others_go_on(saved):
    pool, route = saved.pool(), ["task0", None, "task1", "task1"]
    before = pool(**saved.given, route=route)
    weights = saved.folders[1] / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"adapter 'task1'.*task1 has changed.*pool.refresh\('task1'\)"):
            pool(**saved.given, route=route)
        assert torch.equal(pool(**saved.given, route=["task0"] * 4)[0], before[0])
    pool.refresh("task1")
    got = pool(**saved.given, route=route)
    assert torch.equal(got[0], before[0])
    assert not torch.equal(got[2:], before[2:])
    # A scale is in the other file.
    edit_config(saved.folders[0], lora_alpha=70)
    with pytest.raises(RuntimeError, match="adapter 'task0'"):
        pool(**saved.given, route=route)
    pool.refresh("task0")
    assert (pool(**saved.given, route=route)[0] - before[0]).abs().max() > 1e-3
    shutil.rmtree(saved.folders[0])
    with pytest.raises(FileNotFoundError, match=r"adapter 'task0'.*task0.*is gone"):
        pool(**saved.given, route=route)
    assert torch.equal(pool(**saved.given, route=[None, None, "task1", "task1"])[2:], got[2:])
    with pytest.raises(FileNotFoundError, match=r"task0.*adapter_config.json is missing"):
        pool.refresh("task0")
    pool.prefetch(["task0", "task2"])
    pool._ahead.submit(lambda: None).result()
    assert pool.resident[-1] == "task2"


@torch.no_grad()
def test_a_file_that_changes_while_it_is_read_is_not_kept(saved, monkeypatch):
    from fastcss._one_pass import pool_arena

    pool, put = saved.pool(), pool_arena.put

    def touched(*arguments):
        put(*arguments)
        os.utime(saved.folders[2] / "adapter_model.safetensors", (1, 1))

    monkeypatch.setattr(pool_arena, "put", touched)
    with pytest.raises(RuntimeError, match=r"'task2'.*has changed"):
        pool(**saved.given, route=["task2", "task2", None, None])
    monkeypatch.undo()
    assert "task2" not in pool.resident
    assert not arena(pool)._holders[threading.get_ident()]
    saved.check(pool(**saved.given, route=["task0", "task4", None, None]), ["task0", "task4", None, None])


@torch.no_grad()
def test_another_adapter_in_a_folder_begins_the_pool_anew(saved):
    pool = saved.pool()
    pool(**saved.given, route=["task0"] * 4)
    shutil.rmtree(saved.folders[0])
    shutil.copytree(saved.folders[3], saved.folders[0])  # of other layers and rank
    pool.refresh("task0")
    assert pool.resident == ()
    saved.check(pool(**saved.given, route=["task0"] * 4), ["task3"] * 4)


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


def of_other_kinds():
    linear = {"r": 2, "target_modules": ["query"]}
    return {
        "use_dora": ({**linear, "use_dora": True}, TypeError, "uses use_dora; a pool holds plain LoRA"),
        "a bias of B": ({**linear, "lora_bias": True}, TypeError, "uses lora_bias"),
        "modules": ({**linear, "modules_to_save": ["value"]}, TypeError, "uses modules_to_save"),
        "pissa": ({**linear, "init_lora_weights": "pissa"}, TypeError, "initialised by pissa"),
    }


@pytest.mark.parametrize("kind", of_other_kinds())
def test_other_kinds_are_refused_at_once(kept, tmp_path, kind):
    options, error, message = of_other_kinds()[kind]
    model = peft.get_peft_model(copy.deepcopy(kept.bare), peft.LoraConfig(**options))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(error, match=rf"AdapterPool: .*other.*{message}"):
        AdapterPool(kept.bare, [*kept.folders, tmp_path / "other"], budget=1 << 20)


@pytest.mark.parametrize("damage", ["cut", "no header", "beside", "elsewhere", "pickle", "another model"])
def test_damaged_folders_are_refused_at_once(saved, damage):
    folder = saved.folders[4]
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "no header":
        weights.write_bytes(b"\xff" * 64)
    elif damage == "beside":
        save_file({**held, "base_model.model.value.weight": torch.zeros(7, 6)}, weights)
    elif damage == "elsewhere":
        save_file({key.replace("head", "tail"): value for key, value in held.items()}, weights)
    elif damage == "pickle":
        weights.rename(folder / "adapter_model.bin")
    else:
        save_file({key: value.repeat(2, 2) if "A" in key and value.dim() == 2 else value
                   for key, value in held.items()}, weights)  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=r"AdapterPool: .*task4"):
        saved.pool()


@torch.no_grad()
def test_halves_are_read_as_peft_reads_them(saved):
    """PEFT's adapters run in float32, whatever they were saved in."""
    for folder in saved.folders:
        weights = folder / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights)
    route = ["task0", "task2", "task4", None]
    want = fastcss.one_pass.from_directories(saved.bare, saved.folders)(**saved.given, route=route)
    assert torch.equal(saved.pool()(**saved.given, route=route), want)


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
