"""The one-pass runner against PEFT itself: set_adapter, one forward pass, the next adapter, on real models."""

from __future__ import annotations

import copy
import json
import re
import threading
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fastcss

EXACT = 1e-5  # float32, largest absolute difference: the sums are the loop's in another order


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- models


def grounding_dino():
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4,
        out_features=["stage1", "stage2"], drop_path_rate=0.0,
    )  # fmt: skip
    bert = transformers.BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10, num_feature_levels=3,
        max_text_len=16, fusion_dropout=0.0, fusion_droppath=0.0, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = transformers.GroundingDinoModel(config)
    for layer in model.encoder.layers:  # at their initial 1e-4 the tasks would hardly differ
        nn.init.constant_(layer.fusion_layer.vision_param, 0.5)
        nn.init.constant_(layer.fusion_layer.text_param, 0.5)
    return model


def vit():
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def clip_text():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, eos_token_id=99, bos_token_id=98,
        )
    )  # fmt: skip


def resnet():
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    )


def regnet():
    return transformers.RegNetModel(
        transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="x")
    )


def gpt2():
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=1, n_head=4, use_cache=False)
    )


FUSION = r"encoder\.layers.*\.(vision_proj|text_proj|values_vision_proj|values_text_proj)"
SITES = {
    grounding_dino: rf"backbone.*\.(q_proj|k_proj|v_proj)|{FUSION}",
    vit: ["q_proj", "v_proj", "fc1"],
    clip_text: ["token_embedding", "q_proj", "fc2"],
    resnet: ["convolution"],
    regnet: ["convolution"],
    gpt2: ["c_attn", "wte"],
}
RANKS = {regnet: (4, 8, 4)}  # PEFT wants a multiple of the groups
MODELS = list(SITES)


def inputs(build, batch: int = 1) -> dict:
    torch.manual_seed(batch)
    if build in (clip_text, gpt2):
        return {"input_ids": torch.randint(0, 98, (batch, 7))}
    if build is grounding_dino:
        text = torch.tensor([[101, 300, 301, 1012, 302, 1012, 102]]).expand(batch, -1)
        return {"pixel_values": torch.randn(batch, 3, 64, 64), "input_ids": text.clone()}
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def adapt(model: nn.Module, *configs: dict) -> peft.PeftModel:
    """A PEFT model with adapters task0, task1, …, none of them at its initial zero."""
    adapted = None
    for t, options in enumerate(configs):
        config = peft.LoraConfig(**{"lora_alpha": 7 - t, **options})
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name="task0")
        else:
            adapted.add_adapter(f"task{t}", config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def build_adapted(build, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    return adapt(build(), *({"r": r, "target_modules": SITES[build], **options} for r in RANKS.get(build, (4, 8, 3))))


def loop(model: peft.PeftModel, batch: dict, names=None) -> list:
    """What PEFT gives for each adapter."""
    outputs = []
    for name in names or model.peft_config:
        model.set_adapter(name)
        outputs.append(model(**batch))
    return outputs


def assert_equal(got, outputs: list, tolerance: float = EXACT) -> None:
    """``got`` is ``outputs`` stacked, in their type; and they are not all the same."""
    leaves, structure = pytree.tree_flatten(got)
    expected = [pytree.tree_flatten(output) for output in outputs]
    assert type(got) is type(outputs[0])
    assert all(structure == other for _, other in expected)
    differ = False
    for i, leaf in enumerate(leaves):
        wanted = torch.stack([values[i] for values, _ in expected])
        assert leaf.shape == wanted.shape
        assert leaf.dtype == wanted.dtype
        torch.testing.assert_close(leaf, wanted, atol=tolerance, rtol=0)
        differ |= not torch.equal(wanted[0], wanted[-1])
    assert differ


# --------------------------------------------------------------------------------------------- exactness


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
    """Where torch has no rule for an op it loops over the tasks, and says so when asked."""
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


@torch.no_grad()
def test_bad_routes():
    runner, given = fastcss.one_pass(build_adapted(vit)), inputs(vit, 2)
    with pytest.raises(IndexError, match="3 adapters"):
        runner(**given, route=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="route has 3 entries"):
        runner(**given, route=torch.tensor([0, 1, 1]))
    for route in ([0, 1], torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(TypeError, match="route must be an int32 or int64 tensor"):
            runner(**given, route=route)


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


@pytest.mark.parametrize("build", [grounding_dino, vit, resnet])
@torch.no_grad()
def test_bfloat16_is_as_near_as_peft_to_itself(build):
    """The base model in bfloat16, adapters in float32: no further from float32 than PEFT's own bfloat16."""
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


# ---------------------------------------------------------------------------------------------- training


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return got


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize(  # training a ResNet updates running statistics, which has a test of its own
    ("build", "mode"),
    [(b, m) for b in (grounding_dino, vit, clip_text) for m in ("train", "eval")] + [(resnet, "eval")],
)
def test_gradients_equal_the_loop(build, mode, engine):
    model, given = build_adapted(build), inputs(build, 2)
    model.train(mode == "train")
    for name, parameter in model.named_parameters():  # some of the base model's weights train along
        parameter.requires_grad_("lora_" in name or "norm" in name)
    runner = fastcss.one_pass(model, engine=engine)
    weight = None

    def loss(output, t: int) -> torch.Tensor:
        nonlocal weight
        weight = torch.randn(3, *output[0].shape, generator=torch.Generator().manual_seed(5))
        return (output[0] * weight[t]).mean()

    for t, name in enumerate(runner.adapters):
        model.set_adapter(name)
        loss(model(**given), t).backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "norm" in name)
    expected = gradients(model)
    output = runner(**given)
    sum(loss(pytree.tree_map(lambda leaf, t=t: leaf[t], output), t) for t in range(3)).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert sum("task1" in name for name in got) > 3
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=EXACT * max(1, float(gradient.abs().max())), rtol=0)


def test_a_task_reaches_only_its_own_adapter():
    model, given = build_adapted(vit), inputs(vit)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fastcss.one_pass(model)(**given).last_hidden_state[1].square().mean().backward()
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) == ("task1" in name), name


@pytest.mark.parametrize("build", [nn.Linear, nn.Conv2d])
def test_dropout_is_on_the_adapters_alone(build):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8) if build is nn.Linear else nn.Conv2d(64, 8, 1)
    sites = {"target_modules": ["0"]}
    model = adapt(nn.Sequential(layer), {"r": 4, **sites, "lora_dropout": 0.5}, {"r": 4, **sites})
    runner = fastcss.one_pass(model)
    x = torch.randn(1, 64) if build is nn.Linear else torch.randn(1, 64, 1, 1)
    with torch.no_grad():
        exact = runner(x)
        model.train()
        many = runner(x.expand(20_000, *x.shape[1:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, **_: torch.ones(shape))  # drops nothing
            kept = runner(x)
        bare = layer.base_layer(x) if hasattr(layer, "base_layer") else model.get_base_model()[0].base_layer(x)
    torch.testing.assert_close(many[1], exact[1].expand_as(many[1]), atol=EXACT, rtol=0)
    spread = many[0].flatten(1).std(0)
    assert (spread > 0.05 * (exact[0] - bare).abs().flatten()).all()
    assert ((many[0].flatten(1).mean(0) - exact[0].flatten()).abs() < 5 * spread / 20_000**0.5).all()
    torch.testing.assert_close(kept[0] - bare, 2 * (exact[0] - bare), atol=EXACT, rtol=0)


def test_batch_norm_in_training_runs_in_turn():
    """Each task's pass updates the running statistics, as the loop does."""
    model, given = build_adapted(resnet), inputs(resnet, 2)
    other = copy.deepcopy(model)
    runner = fastcss.one_pass(model)
    model.train(), other.train()
    with pytest.warns(UserWarning, match="running statistics"):
        assert_equal(runner(**given), loop(other, given))
    assert runner.engine == "replay"
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner(**given)
    assert runner.engine == "vmap"


# ----------------------------------------------------------------------------------------------- sharing


def flops(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("engine", ["vmap", "replay"])
def test_flops_of_what_no_adapter_touches_count_once(engine):
    """Adapters in the fusion layers only: Swin, BERT and the projections before the first of them run once."""
    torch.manual_seed(0)
    model = adapt(grounding_dino(), *({"r": 4, "target_modules": FUSION} for _ in range(4)))
    given, base = inputs(grounding_dino), model.get_base_model()
    runner = fastcss.one_pass(model, engine=engine)
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


# ------------------------------------------------------------------------------------- other than vmap


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
    sums = sorted(float(o) for o in torch.stack([choosy(1e6)(x)] * 1 + loop(choosy(1e6), {"x": x})).add(1).sum((1, 2)))
    threshold = (sums[0] + sums[-1]) / 2
    model = choosy(threshold)
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


@torch.no_grad()
def test_the_runner_chooses_how_many_tasks_run_side_by_side(monkeypatch):
    """The first call runs one task alone to measure it; no group's widest tensor may pass the limit then."""
    from fastcss import _group_size, _stand_in

    model, given = build_adapted(vit), inputs(vit)
    assert _group_size.group_size(6, 28 << 20) in (2, 6)  # which one is the C library's doing
    assert _group_size.group_size(6, 0) == 6
    assert _group_size.group_size(6, 1 << 40) == 1
    groups, run = [], _stand_in.StandIn._group

    def record(self, group, *rest):
        groups.append(group)
        return run(self, group, *rest)

    monkeypatch.setattr(_stand_in.StandIn, "_group", record)
    widest = 17 * 64 * 4  # the MLP's hidden activations: tokens × width × bytes
    for limit, expected in ((10**9, [(0,), (1, 2), (0, 1, 2)]), (2 * widest, [(0,), (1, 2), (0, 1), (2,)])):
        monkeypatch.setattr(_group_size, "WIDEST_MAPPED", limit)
        monkeypatch.setattr(_group_size, "WIDEST_KEPT", limit)
        runner = fastcss.one_pass(model)
        groups.clear()
        for _ in range(2):
            assert_equal(runner(**given), loop(model, given))
        assert groups == expected


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
    # What the model writes into what outlives the call is there as the loop leaves it, a refused attempt undone.
    torch.testing.assert_close(model.get_base_model().kept, other.get_base_model().kept)
    torch.testing.assert_close(ours, theirs)


def test_the_models_own_errors_come_through():
    runner = fastcss.one_pass(build_adapted(vit))
    for wrong in ({}, {"pixel_values": torch.randn(1, 3, 40, 40)}, {"pixel_values": torch.randn(1, 5, 32, 32)}):
        with pytest.raises(Exception) as own:  # noqa: PT011
            vit()(**wrong)
        with pytest.raises(type(own.value), match=re.escape(str(own.value)[:60])):
            runner(**wrong)
    assert runner.engine == "vmap"


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


def test_capture_wants_a_gpu():
    with pytest.raises(RuntimeError, match="on a CUDA device, got cpu"):
        fastcss.one_pass(build_adapted(vit)).capture(**inputs(vit))


# --------------------------------------------------------------------------------- what it leaves alone


def state_of(model: nn.Module) -> tuple:
    modules = [(name, type(m), m.training, len(m._forward_hooks), sorted(vars(m))) for name, m in model.named_modules()]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    tensors = {name: (t.data_ptr(), t.clone(), t.requires_grad) for name, t in tensors.items()}
    active = model.active_adapter if isinstance(model, peft.PeftModel) else None
    return modules, tensors, active, model.config.to_dict() if hasattr(model, "config") else None


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = state_of(model)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, (address, value, trains) in before[1].items():
        assert after[1][name][0] == address
        assert after[1][name][2] == trains
        assert torch.equal(after[1][name][1], value)
    assert after[2:] == before[2:]


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


def unsupported():
    """(what, model, what the error names)"""
    sites = {"r": 2, "target_modules": ["q_proj"]}
    yield "dora", lambda: adapt(vit(), sites, {**sites, "use_dora": True}), "q_proj.*task1.*no plain LoRA"
    yield "modules_to_save", lambda: adapt(vit(), {**sites, "modules_to_save": ["pooler"]}), "'pooler'.*modules_to_save"
    yield "no adapters", vit, "ViTModel has no LoRA layer"

    def merged():
        model = adapt(vit(), sites)
        model.merge_adapter()
        return model

    yield "merged", merged, "q_proj.*merged"
    yield (
        "other tuner",
        lambda: peft.get_peft_model(vit(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        "IA3",
    )
    yield (
        "attention",
        lambda: adapt(nn.TransformerEncoderLayer(8, 2, 16), {"r": 2, "target_modules": ["self_attn"]}),
        "'self_attn' is .*MultiheadAttention",
    )

    def hooked():
        model = adapt(vit(), sites)
        model.get_base_model().layers[0].attention.q_proj.base_layer.register_forward_hook(lambda *_: None)
        return model

    yield "hook", hooked, "layers.0.attention.q_proj' has hooks"
    yield "bad engine", lambda: adapt(vit(), sites), "engine must be one of"


@pytest.mark.parametrize(("build", "message"), [pytest.param(b, m, id=w) for w, b, m in unsupported()])
def test_what_cannot_run_is_refused_by_name(build, message):
    model = build()
    before = state_of(model)
    with pytest.raises((TypeError, ValueError), match=message):
        fastcss.one_pass(model, engine="warp" if "engine" in message else "auto")
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------- folders


@pytest.fixture
def saved(tmp_path):
    """(bare model, PEFT model, folders) of one small ViT whose adapters differ in everything."""
    torch.manual_seed(0)
    bare = vit()
    model = adapt(
        copy.deepcopy(bare),
        {"r": 2, "target_modules": ["q_proj", "projection"]},
        {"r": 5, "target_modules": ["fc1"], "use_rslora": True, "lora_bias": True},
        {"r": 3, "target_modules": ["q_proj", "fc2"], "alpha_pattern": {"layers.1.attention.q_proj": 9}},
    )
    model.save_pretrained(tmp_path)
    return bare.eval(), model, [tmp_path / f"task{t}" for t in range(3)]


@torch.no_grad()
def test_folders_equal_peft(saved):
    bare, model, folders = saved
    before = state_of(bare)
    runner = fastcss.one_pass.from_directories(bare, folders)
    assert runner.adapters == ("task0", "task1", "task2")
    assert_equal(runner(**inputs(vit, 2)), loop(model, inputs(vit, 2)))
    assert_untouched(bare, before)
    named = fastcss.one_pass.from_directories(bare, [str(folders[1]), folders[0]], ["b", "a"])
    assert_equal(named(**inputs(vit)), loop(model, inputs(vit), ["task1", "task0"]))


@pytest.mark.parametrize("build", [clip_text, regnet, gpt2])
@torch.no_grad()
def test_folders_of_embeddings_and_convolutions(build, tmp_path):
    torch.manual_seed(0)
    bare = build()
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": SITES[build]} for r in RANKS.get(build, (4, 8))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: it saves the embedding too
        model.save_pretrained(tmp_path)
    runner = fastcss.one_pass.from_directories(bare.eval(), [tmp_path / name for name in model.peft_config])
    assert_equal(runner(**inputs(build, 2)), loop(model, inputs(build, 2)))


def edit_config(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def to_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


LAYER, NORM = "base_model.model.layers.0.attention.q_proj", "layernorm_before"
DAMAGES = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "safetensors is missing"),
    "pickle": (to_pickle, ValueError, "adapter_model.bin is a pickle"),
    "truncated": (truncate, ValueError, "no whole safetensors file"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "no PEFT configuration"),
    "other type": (lambda f: edit_config(f, peft_type="IA3"), TypeError, "IA3 adapter"),
    "dora": (lambda f: edit_config(f, use_dora=True), TypeError, "uses use_dora"),
    "biases": (lambda f: edit_config(f, bias="all"), TypeError, "own biases"),
    "pissa": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), TypeError, "changes the base weights"),
    "magnitudes": (
        lambda f: edit_tensors(f, lambda t: t | {f"{LAYER}.lora_magnitude_vector": torch.ones(3)}),
        TypeError,
        "lora_magnitude_vector",
    ),
    "other weights": (
        lambda f: edit_tensors(f, lambda t: t | {"base_model.model.pooler": torch.ones(3)}), TypeError, "pooler",
    ),
    "half": (
        lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if "lora_B" not in k}), ValueError, "one half",
    ),
    "nothing": (lambda f: edit_tensors(f, lambda t: {}), ValueError, "no adapter weights"),
    "missing layer": (
        lambda f: edit_tensors(f, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
        ValueError,
        "no layer 'layers.7.*another base model",
    ),
    "other width": (
        lambda f: edit_tensors(f, lambda t: {k: torch.ones(4, 48) if "lora_A" in k else v for k, v in t.items()}),
        ValueError,
        "layer 'layers.*holds.*48.*another base model",
    ),
    "other kind": (
        lambda f: edit_tensors(f, lambda t: {k.replace("attention.q_proj", NORM): v for k, v in t.items()}),
        TypeError,
        "layernorm_before' is LayerNorm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(saved, damage):
    bare, _, folders = saved
    harm, error, message = DAMAGES[damage]
    harm(folders[2])
    before = state_of(bare)
    with pytest.raises(error, match=message):
        fastcss.one_pass.from_directories(bare, folders)
    assert_untouched(bare, before)


def test_wrong_names_and_models(saved):
    bare, model, folders = saved
    with pytest.raises(ValueError, match="different adapter names"):
        fastcss.one_pass.from_directories(bare, [folders[0], folders[0]])
    with pytest.raises(ValueError, match="different adapter names"):
        fastcss.one_pass.from_directories(bare, folders, ["a", "b"])
    with pytest.raises(ValueError, match="at least one folder"):
        fastcss.one_pass.from_directories(bare, [])
    with pytest.raises(ValueError, match="has adapters already"):
        fastcss.one_pass.from_directories(model.get_base_model(), folders)
