"""Cases of ``one_pass`` over models as PEFT's users adapt them: Hugging Face's recipes, six adapters or four.

"peft-loop" switches the adapters, "peft-mixed" runs PEFT's mixed batch of one image an adapter, "vmap" maps the model
over stacked adapters. "onnxruntime" loops over T exported models, each with its adapter merged into it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import fastcss

from . import _onnx, _onnx_runtime
from .cases import Case, Problem, Step
from .one_pass import SOURCES

RANK = 16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Names a model and what its adapters are on.

    Attributes:
        model: makes it, small or of its published size.
        adapters: arguments of ``LoraConfig`` beside the rank.
        outputs: the names of the outputs that are compared.
        mixes: PEFT's mixed batch takes it: every adapted module has one row an image.
        exports: it can be run in ONNX.
        tolerance: of errors relative to the largest value.
    """

    name: str
    tasks: int
    pixels: int
    model: Callable[[bool], nn.Module]
    adapters: dict
    outputs: tuple[str, ...] = ("logits",)
    mixes: bool = False
    exports: bool = True
    tolerance: float = 1e-5


def _vit(quick: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**(size if quick else {}), image_size=64 if quick else 224))


def _segformer(quick: bool) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    size = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
    return SegformerForSemanticSegmentation(SegformerConfig(**(size if quick else {}), num_labels=150))


def _mask2former(quick: bool) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 2} if quick else {}
    size = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32} if quick else {}
    size |= {"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5} if quick else {}
    size |= {"num_attention_heads": 2} if quick else {}
    backbone = SwinConfig(**swin, image_size=64 if quick else 224, out_features=[f"stage{s}" for s in (1, 2, 3, 4)])
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=150, **size))


QV = {"target_modules": ["q_proj", "v_proj"]}
LATE = {"target_modules": r".*layers\.(8|9|10|11)\..*(q|v)_proj"}
HEADS = QV | {"modules_to_save": ["decode_head"]}
DECODER = {"target_modules": r".*transformer_module\.decoder.*\.(q|v)_proj", "modules_to_save": ["class_predictor"]}
MASKS = ("class_queries_logits", "masks_queries_logits")
# Mask2Former attends where a mask is above 0.5. Where one is as near to it as float32 rounds, PEFT's own answer for an
# image alone and in a batch of two differ by 9e-3; in float64 all agree to 3e-15.
RECIPES = (
    Recipe("vit-b-qv-t6", 6, 224, _vit, QV, mixes=True),
    Recipe("vit-b-last-third-t6", 6, 224, _vit, LATE, mixes=True),
    Recipe("segformer-b0-heads-t6", 6, 512, _segformer, HEADS),
    Recipe("mask2former-t4", 4, 384, _mask2former, DECODER, MASKS, exports=False, tolerance=2e-2),
)


def cases(device: str, quick: bool) -> list[Case]:
    dtype = torch.float32
    found = []
    for recipe in RECIPES:
        shape = {"T": recipe.tasks, "r": RANK, "H": 64 if quick else recipe.pixels, "W": 64 if quick else recipe.pixels}
        build = functools.partial(_problem, recipe, shape, quick)
        name = f"one_pass/{recipe.name}" + "-quick" * quick
        found.append(Case("one_pass", name, shape, dtype, build, SOURCES, modes=("fwd",)))
    return found


def _problem(recipe: Recipe, shape: dict, quick: bool, device: str, mode: str) -> Problem:
    from peft import LoraConfig, get_peft_model

    bare = recipe.model(quick).eval()
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, **recipe.adapters)
    model = get_peft_model(copy.deepcopy(bare), config, adapter_name="task0")
    names = [f"task{task}" for task in range(shape["T"])]
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    bare, model = bare.to(device), model.eval().to(device)
    pixels = torch.randn(1, 3, shape["H"], shape["W"], device=device)
    outputs = recipe.outputs

    def loop() -> Sequence[Tensor]:
        each = []
        for name in names:
            model.set_adapter(name)
            each.append(_tensors(model(pixel_values=pixels), outputs))
        return tuple(map(torch.stack, zip(*each, strict=True)))

    def one_pass() -> Step:
        runner = fastcss.one_pass(model)
        return torch.no_grad()(lambda: _tensors(runner(pixel_values=pixels), outputs))

    def mixed() -> Sequence[Tensor]:
        output = model(pixel_values=pixels.expand(len(names), -1, -1, -1), adapter_names=names)
        return tuple(tensor.unsqueeze(1) for tensor in _tensors(output, outputs))

    def vmapped() -> Step:
        mapped = copy.deepcopy(model)
        mapped.set_adapter(names[0])
        states = [_own_tensors(model, name, names[0]) for name in names]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        run = torch.vmap(lambda state: _tensors(functional_call(mapped, state, (), {"pixel_values": pixels}), outputs))
        return torch.no_grad()(lambda: run(stacked))

    def onnx_loop() -> Step:
        exported = _onnx.OnnxModel(_Outputs(bare, outputs).eval(), (pixels,))
        runs = [_onnx_runtime.loaded(exported, _merged(model, name)) for name in names]
        return lambda: tuple(map(torch.stack, zip(*(run() for run in runs), strict=True)))

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        one_pass()()
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    providers: dict[str, Callable[[], Step]] = {"fastcss": one_pass, "peft-loop": lambda: torch.no_grad()(loop)}
    providers["vmap"] = vmapped
    if recipe.mixes:
        providers["peft-mixed"] = lambda: torch.no_grad()(mixed)
    if recipe.exports and device == "cpu":
        providers[_onnx_runtime.NAME] = onnx_loop
    return Problem(providers, torch.no_grad()(loop), recipe.tolerance, counter.get_total_flops(), weights)


class _Outputs(nn.Module):
    """Returns a model's named outputs as a tuple, which is what an exporter takes."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return _tensors(self.model(pixel_values=pixel_values), self.outputs)


def _tensors(output, names: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(getattr(output, name) for name in names)


def _own_tensors(model: nn.Module, adapter: str, first: str) -> dict[str, Tensor]:
    """Return what ``adapter`` has for itself, under the names of the ``first`` one's."""
    held = [*model.named_parameters(), *model.named_buffers()]
    own = {name: tensor for name, tensor in held if f".{adapter}." in name}
    return {name.replace(f".{adapter}.", f".{first}."): tensor.detach() for name, tensor in own.items()}


def _merged(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the weights of the bare model that the adapter changes, in the exported model's names."""
    state = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight(adapter)
            state[f"model.{name}.weight"] = (module.base_layer.weight + delta).detach()
        elif hasattr(module, "modules_to_save"):
            own = module.modules_to_save[adapter].named_parameters()
            state |= {f"model.{name}.{parameter}": tensor.detach() for parameter, tensor in own}
    return state
