"""Tests which adapters run: some of them, one for each sample, and adapters with other layers, ranks and biases."""

from __future__ import annotations

import warnings

import pytest
import torch
from adapted_models import EXACT, MODELS, SITES, adapt, assert_equal, build_adapted, inputs, loop, resnet, vit
from torch.utils import _pytree as pytree

import fastcss


@torch.no_grad()
def test_subset_in_the_order_asked_for():
    model, given = build_adapted(vit), inputs(vit, 2)
    runner = fastcss.one_pass(model)
    assert runner.adapters == ("task0", "task1", "task2")
    for names in (["task2", "task0"], ["task1"]):
        got = runner(**given, adapters=names)
        assert_equal(got, loop(model, given, names)) if len(names) > 1 else torch.testing.assert_close(
            got[0][0], loop(model, given, names)[0][0], atol=EXACT, rtol=0
        )
    with pytest.raises(KeyError, match="no adapter 'task9'; there are task0"):
        runner(**given, adapters=["task9"])
    with pytest.raises(ValueError, match="adapters"):
        runner(**given, adapters=[])
    with pytest.raises(ValueError, match="exclude"):
        runner(**given, adapters=["task1"], route=torch.tensor([0, 1]))


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_route_gives_each_sample_its_adapter(build, engine):
    model, given = build_adapted(build), inputs(build, 4)
    got = fastcss.one_pass(model, engine=engine)(**given, route=torch.tensor([2, -1, 0, 2]))
    with model.disable_adapter():
        bare = model(**given)
    of_task = loop(model, given)
    expected = [of_task[2], bare, of_task[0], of_task[2]]
    assert type(got) is type(bare)
    for i, leaf in enumerate(pytree.tree_leaves(got)):
        wanted = torch.stack([pytree.tree_leaves(output)[i][s] for s, output in enumerate(expected)])
        torch.testing.assert_close(leaf, wanted, atol=EXACT, rtol=0)


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_adapters_that_cover_different_layers(engine):
    torch.manual_seed(0)
    model = adapt(
        vit(),
        {"r": 2, "target_modules": r".*layers\.1.*fc1"},
        {"r": 5, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 3, "target_modules": ["fc1", "fc2"], "lora_bias": True},
        {
            "r": 4,
            "target_modules": ["v_proj"],
            "rank_pattern": {"layers.0.attention.v_proj": 7},
            "alpha_pattern": {"v_proj": 3},
        },
    )
    given = {**inputs(vit, 2), "output_hidden_states": True}
    for group_size in (None, 3, 1):
        assert_equal(fastcss.one_pass(model, engine=engine, group_size=group_size)(**given), loop(model, given))


@torch.no_grad()
def test_lora_bias_on_convolutions():
    torch.manual_seed(0)
    options = {"target_modules": SITES[resnet], "lora_bias": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that such an adapter cannot be merged
        model = adapt(resnet(), {"r": 2, **options}, {"r": 5, **options})
    assert_equal(fastcss.one_pass(model)(**inputs(resnet, 2)), loop(model, inputs(resnet, 2)))
