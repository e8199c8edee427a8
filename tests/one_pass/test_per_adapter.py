"""Tests inputs that differ between the adapters, such as each task's own phrases."""

from __future__ import annotations

import re

import pytest
import torch
from adapted_models import EXACT, adapt, build_adapted, inputs, vit
from torch import Tensor, nn

import fastcss


class TextAndImage(nn.Module):
    """A linear layer on an image's tokens, which then meet the classes of a task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, image: Tensor, *, phrases: Tensor, mask: Tensor) -> dict[str, Tensor]:
        tokens = self.second(torch.relu(self.first(image)))
        scores = (tokens @ phrases.t()).masked_fill(mask, -1.0)
        return {"scores": scores, "first": self.first(image), "phrases": phrases * 2}


def setting():
    model = adapt(TextAndImage(), *({"r": r, "target_modules": ["second"]} for r in (2, 3, 4)))
    torch.manual_seed(1)
    given = {"phrases": torch.randn(3, 5, 8), "mask": torch.rand(3, 5) < 0.3}
    return model, torch.randn(2, 7, 8), given


def loop(model, image, given, names) -> list[dict]:
    outputs = []
    for t, name in enumerate(names):
        model.set_adapter(name)
        outputs.append(model(image, **{key: tensor[t] for key, tensor in given.items()}))
    return outputs


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("engine", ["vmap", "replay"])
@pytest.mark.parametrize("names", [("task0", "task1", "task2"), ("task2", "task0")])
@torch.no_grad()
def test_each_adapter_gets_its_own(engine, names, group_size):
    model, image, given = setting()
    given = {name: tensor[: len(names)] for name, tensor in given.items()}
    runner = fastcss.one_pass(model, engine=engine, group_size=group_size)
    expected = loop(model, image, given, names)
    for _ in range(2):  # the first call may measure, the second knows
        got = runner(image, adapters=names, per_adapter=given)
        for key, value in got.items():
            torch.testing.assert_close(value, torch.stack([y[key] for y in expected]), atol=EXACT, rtol=0)


def test_gradients_reach_what_differs():
    model, image, given = setting()
    phrases = given["phrases"].requires_grad_()
    runner = fastcss.one_pass(model, engine="vmap")
    runner(image, per_adapter=given)["scores"].square().sum().backward()
    got, phrases.grad = phrases.grad, None
    torch.stack([y["scores"] for y in loop(model, image, given, runner.adapters)]).square().sum().backward()
    torch.testing.assert_close(got, phrases.grad)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pixel_values": torch.zeros(3, 1)}, ValueError, "'pixel_values' is given twice"),
        ({"extra": [1, 2, 3]}, TypeError, "per_adapter['extra'] must be a tensor, got list"),
        ({"extra": torch.zeros(2, 4)}, ValueError, "per_adapter['extra'] must be [3, …], got [2, 4]"),
        ({"extra": torch.tensor(1.0)}, ValueError, "per_adapter['extra'] must be [3, …], got []"),
    ],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastcss.one_pass(build_adapted(vit))(**inputs(vit), per_adapter=given)


def test_route_has_none():
    with pytest.raises(ValueError, match="per_adapter and route exclude each other"):
        fastcss.one_pass(build_adapted(vit))(
            **inputs(vit), route=torch.tensor([0]), per_adapter={"extra": torch.zeros(3)}
        )
