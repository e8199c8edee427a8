"""Tests PromptGenerator, packed perceptrons of all classes, against as many pairs of torch's linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastcss.models.prompt_generator import PromptGenerator, pack

EXACT = 1e-5  # float32, of the largest value: the sums are torch's in another order
SIZES = {"length": 10, "prompt_dim": 8, "prompts": 3, "hidden": 12}


def generator(classes: int, device: str = "cpu", seed: int = 0) -> PromptGenerator:
    """Build a generator with biases and embeddings as after training; they start at zero."""
    torch.manual_seed(seed)
    built = PromptGenerator(classes, **SIZES)
    for parameter in (built.class_embedding, built.bias_1, built.bias_2):
        nn.init.normal_(parameter)
    return built.to(device)


def one_by_one(built: PromptGenerator, tokens: Tensor, index: Tensor) -> Tensor:
    rows = []
    for z, k in zip(tokens, index.tolist(), strict=True):
        first, second = nn.Linear(10, 12), nn.Linear(12, 24)
        state = {"weight": built.weight_1[k].t(), "bias": built.bias_1[k]}
        other = {"weight": built.weight_2[k].t(), "bias": built.bias_2[k]}
        hidden = torch.relu(torch.func.functional_call(first, state, z + built.class_embedding[k]))
        rows.append(torch.func.functional_call(second, other, hidden).view(3, 8))
    return torch.stack(rows)


@pytest.mark.parametrize("index", [[0], [3, 1, 1, 2], [4, 3, 2, 1, 0]])
def test_equals_linear_layers(index, device):
    built, index = generator(5, device), torch.tensor(index, device=device)
    tokens = torch.randn(len(index), 10, device=device)
    got, expected = built(tokens, index), one_by_one(built, tokens, index)
    assert got.shape == (len(index), 3, 8)
    weights = torch.randn_like(got)
    gradients = [
        torch.autograd.grad((out * weights).sum(), list(built.parameters()), retain_graph=True)
        for out in (got, expected)
    ]
    for g, e in zip((got, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (g - e).abs().max() <= EXACT * e.abs().max()


def test_no_rows():
    built = generator(5)
    assert built(torch.empty(0, 10), torch.empty(0, dtype=torch.long)).shape == (0, 3, 8)


@pytest.mark.parametrize(("length", "weights"), [(512, 2_097_152), (1024, 2_621_440)])
def test_weights_of_a_class_are_the_papers(length, weights):
    with torch.device("meta"):
        assert PromptGenerator(7, length=length).weights_per_class() == weights


def test_untrained_prompts_are_of_the_size_of_their_tokens():
    torch.manual_seed(0)
    built = PromptGenerator(2, length=256, hidden=512)
    prompts = built(torch.randn(2, 256), torch.tensor([0, 1]))
    assert 0.5 < prompts.std() < 1


def test_packed_generators_are_the_generators(device):
    parts = [generator(classes, device, seed=classes) for classes in (2, 1, 3)]
    packed = pack(parts)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert packed.weights_per_class() == parts[0].weights_per_class()
    tokens, first = torch.randn(6, 10, device=device), 0
    together = packed(tokens, torch.arange(6, device=device))
    for part in parts:
        own = torch.arange(len(part.weight_1), device=device)
        rows = first + own
        expected = part(tokens[rows], own)
        assert (together[rows] - expected).abs().max() <= EXACT * expected.abs().max()
        first += len(own)
    parts[0].weight_1.data.zero_()  # what is packed is a copy
    assert packed.weight_1[0].any()


def test_it_says_what_it_is():
    assert generator(5).sizes == {"classes": 5, **SIZES}
    assert repr(generator(5)) == "PromptGenerator(classes=5, length=10, prompt_dim=8, prompts=3, hidden=12)"
