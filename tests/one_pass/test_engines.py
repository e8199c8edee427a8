"""Tests how the runner runs: what it computes once, how many tasks side by side, and what it does if vmap cannot."""

from __future__ import annotations

import copy
import random
import warnings

import peft
import pytest
import torch
from adapted_models import FUSION, adapt, assert_equal, build_adapted, grounding_dino, inputs, loop, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastcss
from fastcss._one_pass import group_size

# --- sharing ----------------------------------------------------------------------------------------------------------


def flops(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("engine", ["vmap", "replay"])
def test_flops_of_what_no_adapter_touches_count_once(engine, fused):
    """Adapters in the fusion layers only: Swin, BERT and the projections before the first of them run once."""
    torch.manual_seed(0)
    model = adapt(grounding_dino(), *({"r": 4, "target_modules": FUSION} for _ in range(4)))
    given, base = inputs(grounding_dino), model.get_base_model()
    runner = fastcss.one_pass(model, engine=engine, fuse=fused)
    if fused:  # the loop, too: torch counts no FLOPs of grid_sample
        fastcss.fuse(model)
    bare = {"backbone": 0, "text_backbone": 0, "input_proj_vision": 0, "text_projection": 0}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        base(**given)
    for name in bare:
        bare[name] = sum(
            sum(ops.values())
            for path, ops in counter.get_flop_counts().items()
            if path.split(".")[1:2] == [name] and path.count(".") == 1 + (name == "input_proj_vision")
        )
    one = flops(lambda: model(**given))
    shared = sum(bare.values())
    assert shared > 0.15 * one
    # The first layer's base projections are shared as well, so four tasks cost a little less than this.
    most = shared + 4 * (one - shared)
    assert 0.8 * most < flops(lambda: runner(**given)) <= most


def test_groups_share_the_prefix():
    torch.manual_seed(0)
    model = adapt(grounding_dino(), *({"r": 4, "target_modules": FUSION} for _ in range(4)))
    given = inputs(grounding_dino)
    together = flops(lambda: fastcss.one_pass(model)(**given))
    groups = flops(lambda: fastcss.one_pass(model, group_size=2)(**given))
    loop_of_four = flops(lambda: loop(model, given))
    assert groups - together < 0.1 * (loop_of_four - together)


@torch.no_grad()
def test_the_runner_chooses_how_many_tasks_run_side_by_side(monkeypatch):
    """The first call runs one task alone to measure it; no group's widest tensor may pass the limit then."""
    from fastcss._one_pass import group_size, passes

    model, given = build_adapted(vit), inputs(vit)
    assert group_size.group_size(6, 28 << 20) in (2, 6)  # which one is the C library's doing
    assert group_size.group_size(6, 0) == 6
    assert group_size.group_size(6, 1 << 40) == 1
    groups, run = [], passes.Passes._group

    def record(self, group, *rest):
        groups.append(group)
        return run(self, group, *rest)

    monkeypatch.setattr(passes.Passes, "_group", record)
    widest = 17 * 64 * 4  # the MLP's hidden activations: tokens × width × bytes
    for limit, expected in ((10**9, [(0,), (1, 2), (0, 1, 2)]), (2 * widest, [(0,), (1, 2), (0, 1), (2,)])):
        monkeypatch.setattr(group_size, "WIDEST_MAPPED", limit)
        monkeypatch.setattr(group_size, "WIDEST_KEPT", limit)
        runner = fastcss.one_pass(model)
        groups.clear()
        for _ in range(2):
            assert_equal(runner(**given), loop(model, given))
        assert groups == expected


# --- other than vmap --------------------------------------------------------------------------------------------------


class Choosy(nn.Module):
    """Branches on its values: vmap can run it only while all tasks take the same branch."""

    def __init__(self, threshold: float):
        super().__init__()
        self.first, self.second, self.threshold = nn.Linear(4, 4), nn.Linear(4, 4), threshold

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > self.threshold else x - 1


def choosy(threshold: float) -> peft.PeftModel:
    torch.manual_seed(0)
    return adapt(Choosy(threshold), *({"r": 2, "target_modules": ["first"]} for _ in range(3)))


@torch.no_grad()
def test_branches():
    x = torch.randn(2, 4)
    agreed = fastcss.one_pass(choosy(-1e6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreed(x)
    assert agreed.engine == "vmap"
    sums = torch.stack(loop(choosy(1e6), {"x": x})).add(1).sum((1, 2))
    model = choosy(float(sums.min() + sums.max()) / 2)
    runner = fastcss.one_pass(model)
    with pytest.warns(UserWarning, match="Choosy does not run under vmap.*differs between the tasks"):
        assert_equal(runner(x), loop(model, {"x": x}))
    assert runner.engine == "replay"
    assert repr(runner) == "OnePass(Choosy, adapters=['task0', 'task1', 'task2'], engine='replay')"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        assert_equal(runner(x), loop(model, {"x": x}))
    with pytest.raises(RuntimeError, match="differs between the tasks"):
        fastcss.one_pass(model, engine="vmap")(x)


class ChannelsLast(nn.Module):
    """Normalises an image whose channels are last in memory, as ConvNeXt leaves them."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.norm(self.layer(x).permute(0, 3, 1, 2))


@torch.no_grad()
def test_group_norm_of_channels_last():
    torch.manual_seed(0)
    model = adapt(ChannelsLast(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    x = torch.randn(2, 5, 6, 8)
    assert_equal(fastcss.one_pass(model, engine="vmap")(x), loop(model, {"x": x}))


class Writer(nn.Module):
    """Writes the tasks' values into a tensor it made, into a view of one, or into what every call shares."""

    def __init__(self, how: str):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.register_buffer("kept", torch.zeros(2, 6))

    def forward(self, x, given):
        out = {"buffer": self.kept, "input": given}.get(self.how, torch.zeros(2, 6))
        out += 1
        before = out * 3
        if self.how == "view":
            out[:, 1:][:, :4] = self.layer(x)
        else:
            out[:, 1:5] = self.layer(x)
        out.mul_(2)
        return out + 1, before


@pytest.mark.parametrize(
    ("how", "engine"),
    [("own", "vmap"), ("view", "replay"), ("buffer", "replay"), ("input", "replay")],
)
@torch.no_grad()
def test_writes_in_place(how, engine):
    model = adapt(Writer(how), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    other, x = copy.deepcopy(model), torch.randn(2, 4)
    ours, theirs = torch.ones(2, 6), torch.ones(2, 6)
    runner = fastcss.one_pass(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(runner(x, ours), loop(other, {"x": x, "given": theirs}))
    assert runner.engine == engine
    # State that outlives the call is as the loop leaves it: a refused attempt was undone.
    torch.testing.assert_close(model.get_base_model().kept, other.get_base_model().kept)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("tasks", "fit", "size"), [(6, 6, 6), (6, 5, 3), (6, 4, 3), (5, 3, 3), (7, 3, 3), (4, 1, 1)])
def test_groups_are_as_few_as_fit_and_of_one_size(tasks, fit, size, monkeypatch):
    monkeypatch.setattr(group_size, "_maps_large_tensors", lambda: True)
    assert group_size.group_size(tasks, group_size.WIDEST_MAPPED // fit) == size
    assert group_size.group_size(tasks, 2 * group_size.WIDEST_KEPT) == 1


class Reads(nn.Module):
    """Reads some of its values as if they were one number."""

    def __init__(self, read, size):
        super().__init__()
        self.layer, self.read, self.size = nn.Linear(4, 4), read, size

    def forward(self, x):
        y = self.layer(x).long()
        self.read(y.flatten()[: self.size] if self.size else y)
        return y


@pytest.mark.parametrize("size", [0, 2, None], ids=["none", "two", "a matrix"])
@pytest.mark.parametrize("read", [bool, float, int, torch.Tensor.item, torch.is_nonzero, [1, 2].__getitem__])
@torch.no_grad()
def test_several_numbers_are_no_number(read, size):
    torch.manual_seed(0)
    size = {0: -8}.get(size, size)
    model = adapt(Reads(read, size), *({"r": 2, "target_modules": ["layer"]} for _ in range(2)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()  # so that the adapters agree
    with pytest.raises((RuntimeError, TypeError, ValueError)) as own:
        model(torch.zeros(2, 4))
    for engine in ("vmap", "auto"):
        with pytest.raises(type(own.value)) as got:
            fastcss.one_pass(model, engine=engine)(torch.zeros(2, 4))
        assert str(got.value) == str(own.value)


class Draws(nn.Module):
    """Returns a random number beside what the adapter touches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x), x * random.random()


@torch.no_grad()
def test_outputs_that_no_adapter_touches_may_differ_from_run_to_run():
    model, x = adapt(Draws(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3))), torch.randn(2, 4)
    runner = fastcss.one_pass(model, engine="replay")
    random.seed(0)
    got = runner(x)
    random.seed(0)
    assert_equal(got, loop(model, {"x": x}))
