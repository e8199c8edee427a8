"""Tests the one-pass runner on real models against PEFT itself: set_adapter, one forward pass, the next adapter."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from adapted_models import (
    MODELS,
    adapt,
    assert_equal,
    assert_untouched,
    build_adapted,
    clip_text,
    grounding_dino,
    inputs,
    loop,
    resnet,
    state_of,
    vit,
)
from torch import nn

import fastcss


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_equals_the_loop(build, batch):
    model, given = build_adapted(build), inputs(build, batch)
    expected = loop(model, given)
    for options in ({"engine": "vmap"}, {"engine": "vmap", "group_size": 2}, {"engine": "replay"}):
        runner = fastcss.one_pass(model, **options)
        assert_equal(runner(**given), expected)
        assert runner.engine == options["engine"]


@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_vmap_needs_no_slow_fallback(build):
    """If torch has no vmap rule for an op, it loops over the tasks; it warns of that when asked."""
    runner, given = fastcss.one_pass(build_adapted(build), engine="vmap"), inputs(build, 2)
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runner(**given)
            runner(**given, route=torch.tensor([1, -1]))
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)


@torch.no_grad()
def test_tuple_outputs_and_untouched_outputs():
    model, given = build_adapted(vit), inputs(vit, 2)
    got = fastcss.one_pass(model)(**given, return_dict=False)
    assert_equal(got, loop(model, {**given, "return_dict": False}))

    class Both(nn.Module):
        def __init__(self, touched):
            super().__init__()
            self.touched = touched

        def forward(self, x):
            return {"touched": self.touched(x), "input": 2 * x, "name": "both", "nothing": None}

    touched = adapt(
        nn.Sequential(nn.Linear(4, 4)), {"r": 1, "target_modules": ["0"]}, {"r": 2, "target_modules": ["0"]}
    )
    x = torch.randn(5, 4)
    for engine in ("vmap", "replay"):
        got = fastcss.one_pass(Both(touched.get_base_model()), engine=engine)(x)
        assert got["touched"].shape == (2, 5, 4)
        assert torch.equal(got["input"], (2 * x).expand(2, 5, 4))
        assert got["name"] == "both"
        assert got["nothing"] is None


@pytest.mark.parametrize("engine", ["vmap", "replay"])
def test_updates_of_weights_and_adapters_are_seen(engine):
    model, given = build_adapted(vit), inputs(vit)
    runner = fastcss.one_pass(model, engine=engine)
    with torch.inference_mode():
        assert_equal(runner(**given), loop(model, given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert_equal(runner(**given), loop(model, given))
        model.get_base_model().to(torch.float64)
        given = {"pixel_values": given["pixel_values"].double()}
        assert_equal(runner(**given), loop(model, given))


def test_the_model_is_left_as_it_was():
    model, given = build_adapted(grounding_dino), inputs(grounding_dino)
    model.set_adapter("task1")
    model(**given)
    before = state_of(model)
    runner = fastcss.one_pass(model)
    with torch.no_grad():
        runner(**given)
        runner(**given, route=torch.tensor([1]))
    assert_untouched(model, before)


@torch.no_grad()
def test_two_threads():
    models = [build_adapted(vit), build_adapted(clip_text)]
    runners = [fastcss.one_pass(models[0]), fastcss.one_pass(models[1])]
    given = [inputs(vit, 2), inputs(clip_text, 2)]
    subsets = [["task0", "task2"], ["task2", "task1", "task0"]]
    expected = [[loop(model, g, names) for names in subsets] for model, g in zip(models, given, strict=True)]
    failures = []

    def work(i: int, names: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_equal(runners[i](**given[i], adapters=subsets[names]), expected[i][names])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i, names)) for i in range(2) for names in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failures


@pytest.mark.parametrize("build", [grounding_dino, vit, resnet])
@torch.no_grad()
def test_bfloat16_is_as_near_as_peft_to_itself(build):
    """The base is in bfloat16, adapters in float32: ours must be no further from float32 than PEFT's own bfloat16."""
    model, given = build_adapted(build), inputs(build, 2)
    exact = loop(model, given)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()
    given = {key: t.bfloat16() if t.is_floating_point() else t for key, t in given.items()}
    runner = fastcss.one_pass(model, engine="vmap")
    name = "encoder_last_hidden_state_vision" if build is grounding_dino else "last_hidden_state"
    want = torch.stack([output[name] for output in exact])
    theirs = torch.stack([output[name] for output in loop(model, given)])
    ours = runner(**given)[name]
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - want).norm() <= 1.1 * (theirs.float() - want).norm()


@torch.no_grad()
def test_autocast():
    model, given = build_adapted(vit), inputs(vit, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fastcss.one_pass(model)(**given), loop(model, given)
    want = torch.stack([output.last_hidden_state for output in loop(model, given)])
    theirs = torch.stack([output.last_hidden_state for output in expected])
    assert got.last_hidden_state.dtype == theirs.dtype
    assert (got.last_hidden_state - want).norm() <= 1.1 * (theirs - want).norm()
