"""Tests the recipes that people save: LoRA with a head or other modules trained whole, and chosen tokens."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from adapted_models import adapt, assert_equal, assert_untouched, gpt2, inputs, loop, reloaded, save, state_of, vit
from safetensors.torch import load_file, save_file
from torch import nn

import fastcss

QV = ["q_proj", "v_proj"]


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def classifier():
    config = vit().config
    config.num_labels = 7
    return transformers.ViTForImageClassification(config)


def language_model(tied=False):
    config = gpt2().config
    config.tie_word_embeddings = tied
    return transformers.GPT2LMHeadModel(config)


def tokens(*indices):
    return {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": list(indices)}}


# Each adapter's options beside its rank.
RECIPES = {
    "segformer": (segformer, [{"target_modules": QV, "modules_to_save": ["decode_head"]}] * 3),
    "vit": (classifier, [{"target_modules": QV, "modules_to_save": ["classifier"]}] * 3),
    "some of them": (
        classifier,
        [
            {"target_modules": QV, "modules_to_save": ["classifier"]},
            {"target_modules": ["k_proj"]},
            {"target_modules": QV, "modules_to_save": ["layers.1.mlp", "vit.layernorm"]},
        ],
    ),
    "others in them": (
        classifier,
        [{"target_modules": ["fc1"]}, {"target_modules": QV, "modules_to_save": ["mlp"]}, {"target_modules": ["fc2"]}],
    ),
    "embedding": (
        language_model,
        [
            {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
            {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        ],
    ),
    "tokens": (language_model, [tokens(3, 5), tokens(3)]),
    "tied tokens": (lambda: language_model(True), [tokens(3, 5), tokens(5, 8)]),
}  # fmt: skip


def of_tasks(model):
    """Return what the adapters own beside LoRA's weights."""
    named = [*model.named_parameters(), *model.named_buffers()]
    named = [(name, t) for name, t in named if "modules_to_save" in name or "trainable_tokens_delta" in name]
    return [(name, t) for name, t in named if t.is_floating_point()]


def make(name):
    """Return the bare model, a PEFT model of it whose adapters differ in everything they own, and inputs."""
    build, options = RECIPES[name]
    torch.manual_seed(0)
    bare = build().eval()
    given = inputs(gpt2 if "token" in name or name == "embedding" else vit, 2)
    if "input_ids" in given:
        given["input_ids"][:, :2] = torch.tensor([3, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, and fan_in_fan_out
        model = adapt(copy.deepcopy(bare), *({"r": 4 - t, **each} for t, each in enumerate(options)))
    with torch.no_grad():
        for _, tensor in of_tasks(model):
            tensor.add_(0.1 * torch.rand_like(tensor))
    return bare, model, given


def rows(given, row):
    return {name: tensor[row : row + 1] for name, tensor in given.items()}


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_recipe_runs_as_peft_runs_it(name, tmp_path):
    bare, model, given = make(name)
    before = state_of(model)
    runner = fastcss.one_pass(model)
    first = runner(**given)
    assert_untouched(model, before)
    for changed in (False, True):
        for _, tensor in of_tasks(model) if changed else ():
            tensor.data.mul_(1.2)
        expected = loop(model, given)
        assert_equal(first if not changed else runner(**given), expected)
        assert_equal(runner(**given, adapters=["task1", "task0"]), expected[1::-1])
        assert_equal(fastcss.one_pass(model, engine="replay")(**given), expected)
    assert runner.engine == "vmap"
    routed = runner(**given, route=torch.tensor([1, -1])).logits
    (chosen,) = loop(model, rows(given, 0), ["task1"])
    with model.disable_adapter():
        plain = model(**rows(given, 1))
    torch.testing.assert_close(routed, torch.cat([chosen.logits, plain.logits]), atol=1e-5, rtol=0)
    if name == "others in them":  # PEFT cannot save it
        return
    folders, before = save(model, tmp_path), state_of(bare)
    of_folders = fastcss.one_pass.from_directories(bare, folders)
    got = of_folders(**given)
    assert_untouched(bare, before)
    assert_equal(got, reloaded(bare, folders, given))
    assert_equal(copy.deepcopy(of_folders)(**given), reloaded(bare, folders, given))
    assert of_folders.engine == "vmap"


@torch.no_grad()
def test_modules_saved_whole_follow_the_model(tmp_path):
    """The module is replaced, its attributes set, and the bare model of folders converted."""
    bare, model, given = make("vit")
    runner = fastcss.one_pass(model)
    runner(**given)
    saved = model.get_base_model().classifier
    saved.modules_to_save["task1"] = nn.Linear(32, 7)
    assert_equal(runner(**given), loop(model, given))
    saved.modules_to_save["task1"].weight = nn.Parameter(torch.randn(7, 32))
    assert_equal(runner(**given), loop(model, given))
    model.add_adapter("task3", peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["classifier"]))
    with pytest.raises(RuntimeError, match="refresh"):
        runner(**given)
    runner.refresh()
    assert_equal(runner(**given), loop(model, given))
    with model.disable_adapter(), pytest.raises(RuntimeError, match="switched off"):
        runner(**given)
    folders = save(model, tmp_path)
    of_folders = fastcss.one_pass.from_directories(bare, folders)
    of_folders(**given)
    bare.double()
    given = {name: t.double() for name, t in given.items()}
    assert_equal(of_folders(**given), reloaded(bare, folders, given))
    bare.classifier = nn.Linear(32, 3).double()
    with pytest.raises(ValueError, match="module 'classifier' is another now, which 'task0' was not saved with"):
        of_folders(**given)


@pytest.mark.parametrize("name", ["vit", "segformer"])
def test_training_reaches_the_modules_of_every_task(name):
    """With a batch norm the tasks run in turn, each head counting its own statistics; otherwise side by side."""
    _, model, given = make(name)
    model.set_requires_grad(["task0", "task1", "task2"])
    other = copy.deepcopy(model).train()
    runner = fastcss.one_pass(model).train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner(**given).logits.square().sum().backward()
    in_turn = [str(w.message) for w in said if "in turn" in str(w.message)]
    assert runner.engine == ("replay" if name == "segformer" else "vmap")
    assert bool(in_turn) == (name == "segformer")
    assert not in_turn or "'decode_head.modules_to_save.task0.batch_norm' updates its running" in in_turn[0]
    outputs = []
    for adapter in other.peft_config:
        other.set_adapter(adapter)
        other.set_requires_grad(["task0", "task1", "task2"])
        outputs.append(other(**given).logits)
    sum(output.square().sum() for output in outputs).backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert {f"task{t}" for t in range(3)} <= {
        part for key in got if "modules_to_save" in key for part in key.split(".")
    }
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, atol=1e-4, rtol=1e-4)
    for (key, mine), (_, theirs) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0, msg=key)


class Writing(nn.Module):
    """Writes its input, and gives back what it has not touched."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, same):
        x.mul_(self.scale)
        return {"y": x + 1, "same": same, "n": 3}


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.last = nn.Linear(4, 4), Writing(), nn.Linear(4, 4)

    def forward(self, x):
        out = self.head(self.first(x), x)
        return {"y": self.last(out["y"]), "same": out["same"], "n": out["n"]}


@pytest.mark.parametrize("site", ["first", "last"], ids=["input of each task", "input of all tasks"])
@torch.no_grad()
def test_a_module_may_write_its_input(site):
    torch.manual_seed(0)
    model = adapt(Around(), *[{"r": 2, "target_modules": [site], "modules_to_save": ["head"]}] * 2)
    for _, tensor in of_tasks(model):
        tensor.add_(torch.rand_like(tensor))
    runner, x = fastcss.one_pass(model), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = runner(x)
    outputs = loop(model, {"x": x})
    assert runner.engine == ("vmap" if site == "first" else "replay")
    torch.testing.assert_close(got["y"], torch.stack([out["y"] for out in outputs]))
    assert torch.equal(got["same"], x.expand(2, 3, 4))
    assert got["n"] == 3


def without(key):
    return lambda folder, tensors: {name: t for name, t in tensors.items() if not name.endswith(key)}


DAMAGES = {
    "missing": (without("classifier.bias"), "'classifier' is saved whole .* does not hold its 'bias'"),
    "surplus": (
        lambda _, t: t | {"base_model.model.classifier.other": torch.ones(2)}, "saved whole, and has no 'other'",
    ),
    "another size": (
        lambda _, t: t | {"base_model.model.classifier.bias": torch.ones(9)}, r"'bias' is \[9\] in the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_whose_modules_do_not_fit(damage, tmp_path):
    bare, model, _ = make("vit")
    folders = save(model, tmp_path)
    harm, message = DAMAGES[damage]
    path = folders[1] / "adapter_model.safetensors"
    save_file(harm(folders[1], load_file(path)), path)
    before = state_of(bare)
    with pytest.raises(ValueError, match=message):
        fastcss.one_pass.from_directories(bare, folders)
    assert_untouched(bare, before)
