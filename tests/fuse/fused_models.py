"""Tiny transformers models from their configs, inputs for them, and comparisons of outputs."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastcss.models.grounding_dino import GroundingDinoEncoder, phrases_to_ids

EXACT = 1e-5  # float32, relative to the tensor's norm: the sums are the model's in another order


def encoder(device: str = "cpu") -> GroundingDinoEncoder:
    """Build an encoder whose points lie between the pixels. A new model's points lie on pixels, where a bilinear read
    has a slope on either side, and rounding decides which of them is the gradient."""
    model, generator = GroundingDinoEncoder.random("tiny"), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            nn.init.normal_(parameter, generator=generator)
    return model.to(device)


def encoder_inputs(batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """Make images of different sizes in one batch, and texts of different lengths."""
    generator, (height, width) = torch.Generator().manual_seed(0), (75, 98)
    ids = phrases_to_ids()[0].repeat(batch, 1)
    read, seen = torch.ones_like(ids), torch.ones(batch, height, width, dtype=torch.long)
    for sample in range(batch):
        read[sample, ids.shape[1] - 3 * sample - 1 :] = 0
        seen[sample, height - 9 * sample - 3 :] = 0
        seen[sample, :, width - 20 * sample - 2 :] = 0
    pixels = torch.randn(batch, 3, height, width, generator=generator)
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": read, "pixel_mask": seen}
    return {name: tensor.to(device) for name, tensor in given.items()}


def random_weights(model: nn.Module) -> nn.Module:
    """Give weights the size of trained ones: many start at 0, where no output depends on them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif "norm" not in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_equal(got: object, expected: object, tolerance: float = EXACT) -> None:
    """Check that the tensors are the same, to ``tolerance`` of the norm of each."""
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        if e.is_floating_point():
            error = (g.double() - e.double()).norm()
            assert error <= tolerance * e.double().norm(), f"{error / e.double().norm():.1e} of the norm"
        else:
            assert torch.equal(g, e)


def assert_same_bits(got: object, expected: object) -> None:
    for g, e in zip(tensors(got), tensors(expected), strict=True):
        assert torch.equal(g, e)


def swin(**options) -> transformers.SwinModel:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return random_weights(transformers.SwinModel(transformers.SwinConfig(**(sizes | options))))
