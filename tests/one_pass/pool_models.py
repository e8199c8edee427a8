"""Makes what the tests of pools run: a model with a layer of every kind, and nine adapters in folders."""

from __future__ import annotations

import copy

import torch
from adapted_models import adapt, save
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastcss._one_pass.adapter_pool import AdapterPool

COUNT, BATCH = 9, 4
SITES = (["query", "value"], ["value", "patch"], ["query", "words", "head"], ["patch"], ["head", "words"])


class Small(nn.Module):
    """Has one layer of every kind, the widths of which share no divisor."""

    def __init__(self):
        super().__init__()
        self.words, self.patch = nn.Embedding(11, 6), nn.Conv2d(3, 6, 2, stride=2)
        self.query, self.value, self.head = nn.Linear(6, 7), nn.Linear(6, 7), Conv1D(5, 7)

    def forward(self, pixels, ids):
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.words(ids)[:, None].mean(2)
        return self.head(torch.tanh(self.query(x)) * self.value(x))


class Saved:
    """A bare model, PEFT's with nine adapters that differ in layers, ranks and scales, and their folders."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.bare = Small().eval()
        options = [{"target_modules": SITES[t % 5], "r": 1 + t % 4, "use_rslora": t % 2 == 0} for t in range(COUNT)]
        self.model = adapt(copy.deepcopy(self.bare), *options)
        self.folders = save(self.model, folder)
        self.given = {"pixels": torch.randn(BATCH, 3, 4, 4), "ids": torch.randint(11, (BATCH, 3))}
        with torch.no_grad():
            self.alone = {name: self.run(name) for name in (None, *self.model.peft_config)}

    def run(self, name):
        """PEFT's outputs with one adapter, for every sample as a batch of one."""
        samples = [{key: value[i : i + 1] for key, value in self.given.items()} for i in range(BATCH)]
        if name is None:
            with self.model.disable_adapter():
                return torch.cat([self.model(**sample) for sample in samples])
        self.model.set_adapter(name)
        return torch.cat([self.model(**sample) for sample in samples])

    def check(self, got, route):
        for i, name in enumerate(route):
            want = self.alone[name][i]
            assert (got[i] - want).abs().max() <= 1e-5 * want.abs().max(), (i, name)

    def pool(self, budget=1 << 20, **options):
        return AdapterPool(self.bare, self.folders, budget=budget, **options)


def arena(pool):
    return pool._state[0].arena


def needs(pool, route):
    return arena(pool).bytes_of(sorted({pool.adapters.index(name) for name in route if name}))


def routes(count=40):
    names = [None, *(f"task{t}" for t in range(COUNT))]
    draws = torch.randint(len(names), (count, BATCH), generator=torch.Generator().manual_seed(1))
    return [[names[t] for t in draw] for draw in draws.tolist()]
