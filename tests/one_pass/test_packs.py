"""Tests what a runner keeps of its adapters: no more than their size, whatever subsets run, and never old values."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from adapted_models import EXACT, adapt, build_adapted, clip_text, inputs, loop, regnet, resnet, vit
from torch import nn

import fastcss
from fastcss._ops import fingerprint

GROWTH = """
import ctypes, random, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from adapted_models import adapt
from torch import nn
import fastcss

def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what is held counts, not what the C library may have kept between it
    with open("/proc/self/statm") as fields:
        return int(fields.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
TASKS, LAYERS, WIDTH = 12, 4, 512
model = adapt(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))),
              *({"r": 128, "target_modules": [str(i) for i in range(LAYERS)]} for _ in range(TASKS)))
size = sum(p.numel() * 4 for name, p in model.named_parameters() if "lora_" in name)
x, chosen = torch.randn(4, WIDTH), random.Random(0)
with torch.no_grad():
    other = adapt(nn.Sequential(nn.Linear(8, 8)), {"r": 2, "target_modules": ["0"]}, {"r": 2, "target_modules": ["0"]})
    fastcss.one_pass(other)(torch.randn(4, 8))  # torch loads much of itself at the first call
    model(x)
    before = resident()
    runner = fastcss.one_pass(model)
    names = list(runner.adapters)
    for _ in range(20):
        runner(x, adapters=chosen.sample(names, 4))
print((resident() - before) / size)
"""


def test_memory_stays_bounded_over_random_subsets():
    command = [sys.executable, "-c", GROWTH, str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 2


def kept_bytes(runner) -> int:
    """Count the bytes that the layers keep, each piece of memory once."""
    found = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            [visit(part) for part in value]
        elif hasattr(value, "__dataclass_fields__"):
            [visit(part) for part in vars(value).values()]

    for layer in runner._model_copy._layers:
        visit([pack for pack, _ in layer._packs.values()])
    return sum(found.values())


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("build", [vit, resnet, clip_text])
@torch.no_grad()
def test_every_subset_of_a_model_equals_the_loop(build, engine):
    model, given, chosen = build_adapted(build), inputs(build), random.Random(1)
    runner, names = fastcss.one_pass(model, engine=engine), ["task0", "task1", "task2"]
    expected = dict(zip(names, loop(model, given), strict=True))
    size = sum(p.numel() * 4 for name, p in model.named_parameters() if "lora_" in name)
    for _ in range(12):
        subset = chosen.choices(names, k=chosen.randint(1, 4))  # in any order, and some twice
        got = runner(**given, adapters=subset).last_hidden_state
        wanted = torch.stack([expected[name].last_hidden_state for name in subset])
        torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)
        assert 0 < kept_bytes(runner) < 5 * size  # ranks are padded in convolutions
    batch = inputs(build, 2)
    routed = runner(**batch, route=torch.tensor([-1, 1])).last_hidden_state
    torch.testing.assert_close(routed[1], loop(model, batch, ["task1"])[0].last_hidden_state[1], atol=EXACT, rtol=0)


@torch.no_grad()
def test_subsets_of_layers_with_biases_and_other_ranks():
    torch.manual_seed(0)
    sites = [{"r": r, "target_modules": ["0", "1"], "lora_bias": r != 3} for r in (2, 3, 5, 4)]
    model, x = adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), *sites), torch.randn(3, 6)
    runner = fastcss.one_pass(model)
    for names in (["task1"], ["task1", "task2"], ["task3", "task1"], ["task2", "task3"]):
        wanted = []
        for name in names:
            model.set_adapter(name)
            wanted.append(model(x))
        torch.testing.assert_close(runner(x, adapters=names), torch.stack(wanted), atol=EXACT, rtol=0)


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "torch"])
def contents(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setitem(fingerprint.backends.UNAVAILABLE, "cpu", "not built")
    return fingerprint.Contents


SHAPES = [(), (1,), (7,), (3, 5), (64, 32), (1000, 333), (0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_fingerprint_sees_every_byte(contents, dtype):
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) * 50).to(dtype) for shape in SHAPES]
    watched = contents(tensors)
    assert watched.changed() == list(range(len(tensors)))
    assert watched.changed() == []
    for place, tensor in enumerate(tensors):
        raw = tensor.view(torch.uint8 if tensor.dim() else dtype).numpy() if tensor.dim() else None
        for _ in range(20 if raw is not None and raw.size else 0):
            at = random.randrange(raw.size)
            raw.reshape(-1)[at] ^= 1 if dtype == torch.bool else 1 << random.randrange(8)
            assert watched.changed() == [place]
    assert watched.changed() == []


def test_a_fingerprint_sees_order_shape_dtype_and_strides(contents):
    a, b = torch.randn(300, 70), torch.zeros(4, 4)
    watched = contents([a, b])
    watched.changed()
    a[[0, 1]] = a[[1, 0]]
    assert watched.changed() == [0]
    a[:, [3, 4]] = a[:, [4, 3]]
    assert watched.changed() == [0]
    a.neg_()
    assert watched.changed() == [0]
    b.data = torch.zeros(2, 8)
    assert watched.changed() == [1]
    b.data = torch.zeros(2, 8, dtype=torch.int32)
    assert watched.changed() == [1]
    b[0, 1] = -0.0
    a.data = a.data.t().contiguous().t()
    assert watched.changed() == []


def test_a_fingerprint_does_not_depend_on_threads():
    tensors = [torch.randn(1 << 20), torch.randn(99)]
    hashes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        hashes.append(fingerprint.fingerprints(tensors))
    assert torch.equal(hashes[0], hashes[1])
    assert torch.equal(hashes[0], hashes[2])


def test_a_thread_sees_a_change_that_another_has_just_found(monkeypatch):
    """A thread found new values and is about to drop the old pack: another thread's call must not run on that pack."""
    torch.manual_seed(0)
    model, x = adapt(nn.Sequential(nn.Linear(8, 4)), {"r": 2, "target_modules": ["0"]}), torch.randn(2, 8)
    runner = fastcss.one_pass(model)
    (layer,) = runner._model_copy._layers
    with torch.no_grad():
        runner(x)
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(3)
        expected, got, forget = model(x), [], layer.forget

        def while_another_calls():
            monkeypatch.setattr(layer, "forget", forget)
            thread = threading.Thread(target=lambda: got.append(torch.no_grad()(runner)(x)[0]))
            thread.start()
            thread.join()
            forget()

        monkeypatch.setattr(layer, "forget", while_another_calls)
        got.append(runner(x)[0])
    for output in got:
        torch.testing.assert_close(output, expected, atol=EXACT, rtol=0)


@torch.no_grad()
def test_writes_are_seen_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setitem(fingerprint.backends.UNAVAILABLE, "cpu", "not built")
    model, given = build_adapted(regnet), inputs(regnet)
    runner = fastcss.one_pass(model)
    before = runner(**given).last_hidden_state
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.mul_(2)
    got = runner(**given).last_hidden_state
    assert not torch.equal(got, before)
    wanted = torch.stack([out.last_hidden_state for out in loop(model, given)])
    torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)
