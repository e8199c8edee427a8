"""Builds a model that counts its calls in every way there is."""

from __future__ import annotations

import types

import torch
from adapted_models import adapt
from torch import nn


class Counts(nn.Module):
    """Counts its calls in every way there is, then branches on a value in which adapters differ."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("reassigned", torch.zeros(()))
        self.register_buffer("means", torch.zeros(2, 4))
        self.no_buffer, self.in_a_list = torch.zeros(()), [torch.zeros(3)[1:]]
        self.steps, self.history, self.bound = 0, [], -1e9
        self.nested = {"history": [], "count": types.SimpleNamespace(calls=0)}

    def forward(self, x, how=None):
        step = int(how != "quiet")  # else it writes what is there already, which is no reason against vmap
        self.calls.add_(step)
        self.no_buffer += step
        self.in_a_list[0].add_(step)
        self.reassigned = self.reassigned + step
        self.steps += step
        self.history += [self.steps] * step
        self.nested["history"] += [self.steps] * step
        self.nested["count"].calls += step
        if how == "once":  # not in the calls before, so that nobody expects it
            self.means[0].add_(1)
        elif how == "unseen":
            torch.ops.aten.add_.Tensor(self.means, torch.ones(()))
        y = self.layer(x)
        if y.sum() > self.bound:
            y = y * self.calls + self.no_buffer * self.in_a_list[0].sum()
            y = y + len(self.nested["history"]) * self.nested["count"].calls
            return y + self.reassigned + self.steps + len(self.history) + self.means.sum()
        return y - self.calls


def counts():
    torch.manual_seed(0)
    model = adapt(Counts(), *({"r": 2, "target_modules": ["layer"]} for _ in range(3)))
    return model, torch.randn(2, 4)


def state(model) -> tuple:
    base = model.get_base_model()
    return base.calls.item(), base.means.tolist(), base.no_buffer.item(), base.in_a_list[0].tolist()
