"""The package segment_anything, fused, against itself."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType

import left_out
import peft
import pytest
import torch
from fused_models import assert_equal, assert_same_bits, random_weights
from torch import Tensor, nn

import fastcss

INSTALLED = importlib.util.find_spec("segment_anything") is not None
pytestmark = left_out.points(lambda: INSTALLED, "the package segment_anything is not installed")
# What it imports at once, and calls only to scale pictures and to propose masks. The wheels of torchvision that pip
# finds are for CUDA: beside a torch without it they do not load, and then neither does transformers, which tries to.
NOT_CALLED = {
    "torchvision": (),
    "torchvision.ops": (),
    "torchvision.ops.boxes": ("batched_nms", "box_area"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("resize", "to_pil_image"),
}


@pytest.fixture(scope="module")
def modeling() -> ModuleType:
    """The package's models; where there is no torchvision, names without meaning stand in for its functions."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name, members in NOT_CALLED.items():
                module = ModuleType(name)
                vars(module).update(dict.fromkeys(members))
                patch.setitem(sys.modules, name, module)
        return importlib.import_module("segment_anything.modeling")


@pytest.fixture
def sam(modeling) -> nn.Module:
    return random_weights(
        modeling.Sam(
            modeling.ImageEncoderViT(
                img_size=160, depth=3, embed_dim=32, num_heads=2, out_chans=16, global_attn_indexes=[1], window_size=4,
                use_rel_pos=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            ),
            modeling.PromptEncoder(16, (10, 10), (160, 160), mask_in_chans=8),
            modeling.MaskDecoder(
                transformer_dim=16,
                transformer=modeling.TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=16),
            ),
        )
    )  # fmt: skip


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_equals_the_encoder(sam):
    encoder, x = sam.image_encoder, pictures()
    expected, names = encoder(x), list(encoder.state_dict())
    fusion = fastcss.fuse(encoder)
    assert list(fusion.replaced.values()).count("relative_attention") == 3
    assert fusion.refused == {}
    assert list(encoder.state_dict()) == names
    assert_equal(encoder(x), expected)
    fusion.undo()
    assert_same_bits(encoder(x), expected)


@torch.no_grad()
def test_equals_the_whole_model(sam):
    picture = torch.randint(0, 256, (3, 120, 160), generator=torch.Generator().manual_seed(0)).float()
    points = {"point_coords": torch.tensor([[[30.0, 40.0]]]), "point_labels": torch.ones(1, 1)}
    given = [{"image": picture, "original_size": (120, 160), **points}]
    expected = sam(given, multimask_output=True)
    fastcss.fuse(sam)
    got = sam(given, multimask_output=True)
    for name in ("iou_predictions", "low_res_logits"):
        assert_equal(got[0][name], expected[0][name])


@pytest.mark.parametrize("index", [0, 1], ids=["windows", "whole"])
@pytest.mark.parametrize("size", [(10, 10), (8, 12), (3, 5)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_blocks(sam, index, size):
    """The tables of a block without windows are for 10x10; the windows are of 4x4."""
    block, x = sam.image_encoder.blocks[index], torch.randn(2, *size, 32).requires_grad_()
    wanted = [x, block.attn.rel_pos_h, block.attn.qkv.weight, block.mlp.lin1.weight]

    def run() -> tuple[Tensor, ...]:
        output = block(x)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return output, *torch.autograd.grad((output * weights).sum(), wanted)

    expected = run()
    assert fastcss.fuse(block).replaced[""] == "relative_attention"
    assert_equal(run(), expected)


@torch.no_grad()
def test_encoder_without_relative_positions(modeling):
    encoder = modeling.ImageEncoderViT(img_size=160, depth=1, embed_dim=32, num_heads=2, out_chans=16)
    assert fastcss.fuse(encoder).refused == {"blocks.0": "its attention has no relative positions"}


@pytest.mark.parametrize("options", [{"engine": "vmap"}, {"engine": "replay"}], ids=str)
@torch.no_grad()
def test_adapters_in_one_pass(sam, options):
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "lin1", "lin2"], init_lora_weights=False)
    torch.manual_seed(0)
    model, x = peft.get_peft_model(sam.image_encoder, config, "first").eval(), pictures()
    model.add_adapter("second", config)
    expected = []
    for name in model.peft_config:
        model.set_adapter(name)
        expected.append(model(x))
    assert (expected[1] - expected[0]).norm() > 1e-2 * expected[0].norm()
    runner = fastcss.one_pass(model, **options)
    assert list(runner.fusion.replaced.values()) == ["relative_attention"] * 3
    assert_equal(list(runner(x)), expected)
