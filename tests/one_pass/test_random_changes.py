"""Tests random sequences of changes to a runner's model: after each the runner equals PEFT's loop or says what to do.

``pytest tests/one_pass/test_random_changes.py --sequences 2000`` runs as many new ones.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import ClassVar

import peft
import torch
from adapted_models import adapt
from torch import nn

import fastcss

SEQUENCES, STEPS = 25, 7
TOLERANCE = 1e-5  # of the largest value
SITES = ("conv", "first", "second", "embed")


class Small(nn.Module):
    """A layer of each kind, normalisation with buffers, and one more buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.embed, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head, self.layernorm = nn.Sequential(nn.Linear(4, 3)), nn.LayerNorm(4)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, image, ids):
        x = self.norm(self.conv(image)).flatten(2).mean(-1) + self.embed(ids).mean(1) + self.shift
        x = x + self.second(torch.relu(self.first(self.layernorm(x))))
        return {"out": self.head(x), "features": x}


class Driver:
    """One sequence: a model, its runner, and changes drawn at random."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        configs = [self.config() for _ in range(self.draw.randint(1, 3))]
        self.model, self.names, self.handles, self.log = adapt(Small(), *configs), len(configs), [], []
        options = {"engine": self.draw.choice(["auto", "replay"]), "fuse": self.draw.choice([None, False])}
        self.runner = fastcss.one_pass(self.model, **options, group_size=self.draw.choice([None, 1, 2]))
        self.log.append(str(options))

    def config(self) -> dict:
        sites = self.draw.sample(SITES, self.draw.randint(1, 3))
        return {
            "r": self.draw.randint(1, 4), "lora_alpha": self.draw.randint(1, 9), "target_modules": sites,
            "lora_bias": "embed" not in sites and self.draw.random() < 0.3,
        }  # fmt: skip

    @property
    def base(self) -> Small:
        return self.model.base_model.model  # get_base_model() fails where the active adapter was deleted

    def a_layer(self) -> nn.Module:
        return self.draw.choice([m for m in self.base.modules() if hasattr(m, "lora_A")])

    def a_tensor(self) -> nn.Parameter:
        kind = self.draw.choice(["lora_", ""])
        return self.draw.choice([p for name, p in self.model.named_parameters() if kind in name])

    def an_adapter(self) -> str:
        return self.draw.choice(list(self.model.peft_config))

    # --- changes: each is drawn by name

    def nothing(self) -> None:
        pass

    def write(self) -> None:
        tensor = self.a_tensor()
        tensor.copy_(torch.randn_like(tensor) / 3)

    def write_data(self) -> None:
        tensor = self.a_tensor()
        tensor.data.copy_(torch.randn_like(tensor) / 3)

    def write_one_element(self) -> None:
        tensor = self.a_tensor().data.view(-1)
        tensor[self.draw.randrange(len(tensor))] += 0.7

    def write_numpy(self) -> None:
        tensor = self.a_tensor().detach()
        if not tensor.is_inference():
            tensor.numpy()[...] = torch.randn_like(tensor).numpy() / 3

    def write_in_inference_mode(self) -> None:
        with torch.inference_mode():
            self.a_tensor().neg_()

    def swap_data(self) -> None:
        tensor = self.a_tensor()
        tensor.data = torch.randn_like(tensor) / 3

    def swap_two(self) -> None:
        names = list(self.model.peft_config)
        for layer in (m for m in self.base.modules() if hasattr(m, "lora_A")):
            there = [name for name in names if name in layer.lora_A]
            if len(there) > 1:
                one, other = layer.lora_B[there[0]].weight, layer.lora_B[there[-1]].weight
                if one.shape == other.shape:
                    one.data, other.data = other.data, one.data

    def new_parameter(self) -> None:
        layer = self.a_layer()
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.weight = nn.Parameter(torch.randn_like(part.weight) / 3)

    def load_assign(self) -> None:
        state = self.model.state_dict()
        floats = {k: torch.rand_like(t) / 3 + 0.1 if t.is_floating_point() else t.clone() for k, t in state.items()}
        self.model.load_state_dict(floats, assign=True)

    def reassign_buffer(self) -> None:
        self.base.shift = torch.randn_like(self.base.shift)
        self.base.norm.running_mean = torch.randn_like(self.base.norm.running_mean)

    def new_head(self) -> None:
        self.base.head = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(self.base.shift)

    def attribute(self) -> None:
        self.base.layernorm.eps = self.draw.choice([1e-5, 0.1, 1.0])

    def scale(self) -> None:
        name = self.an_adapter()
        for layer in self.base.modules():
            if hasattr(layer, "lora_A"):
                layer.set_scale(name, self.draw.choice([0.5, 1.0, 2.0]))

    def merge(self) -> None:
        self.model.merge_adapter([self.an_adapter()])

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def add(self) -> None:
        self.names += 1
        name = f"task{self.names - 1}"
        self.model.add_adapter(name, peft.LoraConfig(**self.config()))
        for key, parameter in self.model.named_parameters():
            if f".{name}" in key:
                parameter.data.copy_(torch.randn_like(parameter) / 3)

    def delete(self) -> None:
        if len(self.model.peft_config) > 1:
            self.model.unmerge_adapter()  # PEFT deletes none that is merged
            self.model.delete_adapter(self.an_adapter())

    def activate(self) -> None:
        self.model.set_adapter(self.an_adapter())

    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()

    def train(self) -> None:
        self.model.train(not self.model.training)

    def train_a_part(self) -> None:
        self.draw.choice(list(self.base.children())).train(not self.model.training)

    def dtype(self) -> None:
        self.model.to(self.draw.choice([torch.float32, torch.float64]))

    def hook(self) -> None:
        module = self.draw.choice([self.base, self.base.norm, self.base.layernorm, self.a_layer()])
        if module is self.base:
            self.handles.append(module.register_forward_hook(lambda m, a, out: {**out, "out": out["out"] + 1}))
        else:
            self.handles.append(module.register_forward_hook(lambda m, a, out: out * 1.5))

    def hook_inside(self) -> None:
        layer = self.a_layer()
        parts = [*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_dropout.values(), layer.base_layer]
        self.handles.append(self.draw.choice(parts).register_forward_hook(lambda m, a, out: out * 2))

    def unhook(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def replace_forward(self) -> None:
        module = self.draw.choice([self.base.head, self.base])
        original = module.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            return {**out, "features": out["features"] - 1} if isinstance(out, dict) else out * 0.5

        module.forward = forward

    def copy_runner(self) -> None:
        if not self.handles and not any("forward" in vars(m) for m in self.base.modules()):
            self.runner = copy.deepcopy(self.runner)  # Python copies a closure's function, but not what it closes over
            self.model = self.runner.model

    def refresh(self) -> None:
        self.runner.refresh()

    # --- a call, and what PEFT gives

    def inputs(self, batch: int) -> dict:
        image = torch.randn(batch, 2, 4, 4, dtype=self.base.shift.dtype)
        return {"image": image, "ids": torch.randint(9, (batch, 3))}

    def of(self, given: dict, name: str | None) -> dict:
        if name is None:
            self.model.set_adapter(next(iter(self.model.peft_config)))  # the active one may have been deleted
            with self.model.disable_adapter():
                return self.model(**given)
        self.model.set_adapter(name)
        return self.model(**given)

    def check(self) -> None:
        names, batch = list(self.runner.adapters), self.draw.randint(2, 3)
        given, how = self.inputs(batch), self.draw.choice(["all", "some", "route"])
        self.log.append(how)
        if how == "route" and not any(m.training for m in self.base.modules()):
            route = [self.draw.randrange(-1, len(names)) for _ in range(batch)]
            got = self.runner(**given, route=torch.tensor(route))
            outs = [self.of(given, None if t < 0 else names[t]) for t in route]
            wanted = {key: torch.stack([out[key][s] for s, out in enumerate(outs)]) for key in outs[0]}
        else:
            some = self.draw.sample(names, self.draw.randint(1, len(names))) if how == "some" else names
            got = self.runner(**given, adapters=None if how == "all" else some)
            outs = [self.of(given, name) for name in some]
            wanted = {key: torch.stack([out[key] for out in outs]) for key in outs[0]}
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert got[key].dtype == value.dtype
            difference = (got[key] - value).abs().max() / value.abs().max()
            assert difference <= TOLERANCE, (key, float(difference))

    REMEDIES: ClassVar[dict[str, Callable[[Driver], None]]] = {
        "unmerge_adapter()": lambda self: self.model.unmerge_adapter(),
        "runner.refresh()": lambda self: self.runner.refresh(),
        "enable_adapters()": lambda self: self.model.base_model.enable_adapter_layers(),
        "has hooks": lambda self: self.unhook(),
        "have hooks": lambda self: self.unhook(),
    }

    def checked(self, what: Callable[[], None]) -> int:
        """Count how often ``what`` was refused before it ran; each time the message said what to do."""
        for refusals in range(8):
            try:
                what()
                return refusals
            except (RuntimeError, ValueError, TypeError) as error:
                remedy = next((do for says, do in self.REMEDIES.items() if says in str(error)), None)
                if remedy is None or not str(error).startswith("one_pass: "):
                    raise
                self.log.append(f"refused: {error}")
                remedy(self)
        raise AssertionError("refused again and again")


NOT_CHANGES = ("config", "base", "a_layer", "a_tensor", "an_adapter", "inputs", "of", "check", "checked")
CHANGES = [name for name, f in vars(Driver).items() if callable(f) and name[0] != "_" and name not in NOT_CHANGES]


def run(seed: int) -> int:
    driver, refused = Driver(seed), 0
    try:
        driver.checked(driver.check)
        for _ in range(STEPS):
            for _ in range(driver.draw.choice([1, 1, 2])):
                change = driver.draw.choice(CHANGES)
                driver.log.append(change)
                with torch.no_grad():
                    refused += driver.checked(getattr(driver, change))
            with driver.draw.choice([torch.no_grad, torch.enable_grad, torch.inference_mode])():
                refused += driver.checked(driver.check)
    except Exception as error:
        raise AssertionError(f"sequence {seed}: {'; '.join(driver.log)}") from error
    return refused


def test_random_sequences_of_changes(pytestconfig, record_table):
    wanted = pytestconfig.getoption("--sequences")
    first = random.randrange(1 << 30) if wanted else 0
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(first, first + (wanted or SEQUENCES)):
            refused += run(seed)
    row = {"sequences": wanted or SEQUENCES, "first": first, "refused with a remedy": refused, "silently wrong": 0}
    record_table("random changes under a runner", row)
    assert refused > 0
