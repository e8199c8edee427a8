"""Small models of each kind with PEFT adapters on them, PEFT's loop over these, and comparisons with it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

EXACT = 1e-5  # the largest absolute difference in float32: the sums are the loop's in another order
#: The layers of adapters that come and go.
COMING = ["q_proj", "v_proj", "fc1"]


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
    for layer in model.encoder.layers:  # the tasks would hardly differ at the initial 1e-4
        nn.init.constant_(layer.fusion_layer.vision_param, 0.5)
        nn.init.constant_(layer.fusion_layer.text_param, 0.5)
    return model


def object_detector():
    """Build the whole detector, with boxes and scores."""
    config = grounding_dino().config
    config.decoder_layers = 2  # transformers ties the boxes' heads of the layers after the first
    return transformers.GroundingDinoForObjectDetection(config).eval()


def _transformer(model_class, **options):
    """Build a model of two layers of width 32."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return model_class(model_class.config_class(**sizes, **options))


def vit():
    return _transformer(
        transformers.ViTModel, image_size=32, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def clip_text():
    return _transformer(
        transformers.CLIPTextModel, vocab_size=100, max_position_embeddings=16, eos_token_id=99, bos_token_id=98
    )


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
    """Make a PEFT model with adapters task0, task1, …, none of which is at its initial zero."""
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


def save(model: peft.PeftModel, folder: Path, **options) -> list[Path]:
    """Save the adapters of ``model`` by PEFT, and return their folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shapes of biases, and embeddings that it saves too
        model.save_pretrained(folder, **options)
    return [folder if name == "default" else folder / name for name in model.peft_config]


def edit_config(folder, **options) -> None:
    """Change what an adapter's own config says."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def reloaded(bare: nn.Module, folders: list[Path], batch: dict, train: bool = False) -> list:
    """Return PEFT's output for each folder, loaded alone into a fresh copy of ``bare``."""
    outputs = []
    for folder in folders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about layers that a folder lacks
            model = peft.PeftModel.from_pretrained(copy.deepcopy(bare), folder)
        outputs.append(model.train(train)(**batch))
    return outputs


LAYER = "layers.0.attention.q_proj"  # of vit, and adapted


def lora(model: peft.PeftModel, layer: str = LAYER) -> nn.Module:
    return model.get_base_model().get_submodule(layer)


# --- PEFT's loop, and what it leaves behind ------------------------------------------------------------------------


def loop(model: peft.PeftModel, batch: dict, names=None) -> list:
    """Return PEFT's output for each adapter."""
    outputs = []
    for name in names or model.peft_config:
        model.set_adapter(name)
        outputs.append(model(**batch))
    return outputs


def assert_same_bits(got, expected) -> None:
    for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs)


def assert_equal(got, outputs: list, tolerance: float = EXACT) -> None:
    """Check that ``got`` is ``outputs`` stacked, in their type, and that these are not all the same."""
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
