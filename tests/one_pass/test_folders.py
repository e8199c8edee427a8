"""Tests that adapters are read from the folders of PEFT and others as PEFT reads them."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
import transformers
from adapted_models import (
    RANKS,
    SITES,
    adapt,
    assert_equal,
    assert_untouched,
    clip_text,
    edit_config,
    gpt2,
    grounding_dino,
    inputs,
    loop,
    object_detector,
    regnet,
    reloaded,
    save,
    state_of,
    vit,
)
from safetensors.torch import load_file, save_file
from torch import nn

import fastcss


@torch.no_grad()
def test_folders_equal_peft(saved):
    bare, model, folders = saved
    before = state_of(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's own folders hold nothing that is not known
        runner = fastcss.one_pass.from_directories(bare, folders)
    assert runner.adapters == ("task0", "task1", "task2")
    assert_equal(runner(**inputs(vit, 2)), loop(model, inputs(vit, 2)))
    assert_untouched(bare, before)
    named = fastcss.one_pass.from_directories(bare, [str(folders[1]), folders[0]], names=["b", "a"])
    assert_equal(named(**inputs(vit)), loop(model, inputs(vit), ["task1", "task0"]))


@pytest.mark.parametrize("build", [clip_text, regnet, gpt2])
@torch.no_grad()
def test_folders_of_embeddings_and_convolutions(build, tmp_path):
    torch.manual_seed(0)
    bare = build()
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": SITES[build]} for r in RANKS.get(build, (4, 8))))
    runner = fastcss.one_pass.from_directories(bare.eval(), save(model, tmp_path))
    assert_equal(runner(**inputs(build, 2)), loop(model, inputs(build, 2)))


@torch.no_grad()
def test_dropout_of_folders_follows_train_and_eval(tmp_path):
    """Folders have no layers of PEFT's, so the adapted layer's own mode says whether adapters drop; one here drops
    all."""
    torch.manual_seed(0)
    bare, given, config = vit(), inputs(vit), {"r": 2, "target_modules": SITES[vit]}
    model = adapt(copy.deepcopy(bare), config | {"lora_dropout": 1.0}, config)
    runner = fastcss.one_pass.from_directories(bare, save(model, tmp_path))
    for mode in (True, False, True):
        runner.train(mode)
        first, second = loop(model, given)
        assert_equal(runner(**given), [bare(**given) if mode else first, second])


def rewrite(folder, rename):
    """Write the same tensors under other keys."""
    path = folder / "adapter_model.safetensors"
    save_file({rename(key): tensor for key, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("build", [vit, clip_text])
@torch.no_grad()
def test_keys_with_the_adapters_name_in_them(build, tmp_path):
    torch.manual_seed(0)
    bare, given = build().eval(), inputs(build, 2)
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": SITES[build]} for r in (2, 3)))
    folders = save(model, tmp_path)
    for folder in folders:  # as state_dict() has them, and as PEFT reads them for an adapter of that name
        rewrite(folder, lambda key: re.sub(r"(lora_(embedding_)?[AB])", r"\1.default", key))
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), loop(model, given))
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given))


def language_model(tied: bool):
    config = gpt2().config
    config.tie_word_embeddings = tied
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sites", [["c_attn"], ["wte"], ["wte", "lm_head"]], ids=",".join)
@torch.no_grad()
def test_embeddings_saved_with_the_adapters(sites, tied, tmp_path):
    torch.manual_seed(0)
    bare, given = language_model(tied), inputs(gpt2, 2)
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": sites} for r in (2, 3)))
    folders = save(model, tmp_path, save_embedding_layers=True)
    assert any(
        re.search(r"(wte|base_layer)\.weight", key) for key in load_file(folders[0] / "adapter_model.safetensors")
    )
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given))
    bare.transformer.wte.weight[3] += 1
    bare.lm_head.weight[3] += 1
    with pytest.raises(TypeError, match=r"(wte|lm_head).*differs from the model's own.*load it into the model"):
        fastcss.one_pass.from_directories(bare, folders)


@torch.no_grad()
def test_an_adapter_tied_to_the_embeddings(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    bare, given = transformers.LlamaForCausalLM(config).eval(), inputs(gpt2, 2)
    sites = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    folders = save(adapt(copy.deepcopy(bare), *({"r": r, **sites} for r in (2, 3))), tmp_path)
    with pytest.raises(ValueError, match=r"task1 holds no weights for 'lm_head', where ensure_weight_tying.*alone"):
        fastcss.one_pass.from_directories(bare, folders)
    alone = peft.PeftModel.from_pretrained(copy.deepcopy(bare), folders[1], adapter_name="alone")
    folders[1] = save(alone, tmp_path)[0]
    assert_equal(fastcss.one_pass.from_directories(bare, folders)(**given), reloaded(bare, folders, given))
    path = folders[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"holds weights for 'lm_head'.*ensure_weight_tying"):
        fastcss.one_pass.from_directories(bare, folders)


class ThreeNames(nn.Module):
    """Has one layer under three names, one of them in a block with two names; another layer shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.block = nn.Sequential(nn.Linear(8, 8), self.first)
        self.again = self.block
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight

    def forward(self, x):
        for layer in (self.first, self.second, self.block, self.again, self.tied):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("sites", [["first"], ["first", "0"], ["tied", "0"]], ids=",".join)
@torch.no_grad()
def test_a_layer_of_several_names_is_adapted_under_the_one_that_peft_adapts(sites, tmp_path):
    torch.manual_seed(0)
    bare, given = ThreeNames().eval(), {"x": torch.randn(2, 8)}
    model = adapt(copy.deepcopy(bare), *({"r": r, "target_modules": sites} for r in (2, 3)))
    folders = save(model, tmp_path)
    for engine in ("vmap", "replay"):
        assert_equal(fastcss.one_pass(model, engine=engine)(**given), loop(model, given))
        assert_equal(
            fastcss.one_pass.from_directories(bare, folders, engine=engine)(**given), reloaded(bare, folders, given)
        )
    edit_config(folders[0], init_lora_weights="olora")
    with pytest.raises(TypeError, match=r"olora, which changes the weight that it shares with another layer; convert"):
        fastcss.one_pass.from_directories(bare, folders)
    edit_config(folders[0], init_lora_weights=True)
    rewrite(folders[1], lambda key: key.replace("first", "second").replace("block.0", "again.0"))
    with pytest.raises(ValueError, match=r"layer '(second|again.0)' is the model's '(first|block.0)' by another name"):
        fastcss.one_pass.from_directories(bare, folders)


@torch.no_grad()
def test_a_shared_peft_layer_is_adapted_wherever_it_is_called():
    torch.manual_seed(0)
    model = adapt(ThreeNames(), *({"r": r, "target_modules": ["first"]} for r in (2, 3)))
    given = {"x": torch.randn(2, 8)}
    model.base_model.model.second = model.base_model.model.first
    assert_equal(fastcss.one_pass(model)(**given), loop(model, given))


@torch.no_grad()
def test_layers_that_a_folder_lacks_are_named(tmp_path):
    torch.manual_seed(0)
    bare, given = vit().eval(), inputs(vit, 2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name="0")
    for name in ("1", "2"):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    folders = save(model, tmp_path)  # PEFT keeps layer 0 alone in "0", because "1" is the name of an adapter, too
    with pytest.warns(UserWarning, match=r"no weights for 'layers.1.*q_proj', 'layers.1.*v_proj', which") as said:
        runner = fastcss.one_pass.from_directories(bare, folders[:1])
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="run without the adapter, as PEFT runs them"):
        runner = fastcss.one_pass.from_directories(bare, folders[:2])
    assert_equal(runner(**given), reloaded(bare, folders[:2], given))
    with pytest.raises(ValueError, match=r"2 holds no adapter weights.*rename it"):
        fastcss.one_pass.from_directories(bare, folders)
    edit_config(folders[0], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"layers.1.*PEFT would draw them at random"):
        fastcss.one_pass.from_directories(bare, folders[:2])


@torch.no_grad()
def test_pissa_converted_by_peft_is_plain_lora(tmp_path):
    torch.manual_seed(0)
    bare, given = vit().eval(), inputs(vit, 2)
    model = adapt(copy.deepcopy(bare), {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    config = model.peft_config["task0"]
    config.init_lora_weights = True
    first = save(model, tmp_path)[0].rename(tmp_path / "first")
    config.init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += 0.3
    given_up = save(model, tmp_path / "as it is")[0]
    converted = save(model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(first))[0]
    got = fastcss.one_pass.from_directories(bare, [converted, given_up], names=["converted", "as it is"])(**given)
    wanted = reloaded(bare, [converted, given_up], given)
    for i in range(2):
        torch.testing.assert_close(got[0][i], wanted[i][0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_grounding_dino_for_object_detection_as_the_docs_show_it(tmp_path):
    torch.manual_seed(0)
    bare, given = object_detector(), inputs(grounding_dino, 2)
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(target_modules=["vision_proj"]))
    for_peft = copy.deepcopy(bare)
    for_peft.config.tie_word_embeddings = False
    sites = rf"model\.({SITES[grounding_dino]})"
    model = adapt(for_peft, *({"r": r, "target_modules": sites} for r in (2, 3)))
    outputs = loop(model, given)
    assert_equal(fastcss.one_pass(model)(**given), outputs)
    assert_equal(fastcss.one_pass.from_directories(bare, save(model, tmp_path))(**given), outputs)
