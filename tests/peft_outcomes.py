"""Compares what one_pass makes of a PEFT model with PEFT's own loop over its adapters, for tests/peft_suite.py and
docs/make_recipes.py: in one call, with a route, from folders, in training and exported."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastcss

#: The largest error of a tensor, of its largest value: the sums are the loop's in another order.
EXACT = 1e-5
#: Outputs of two adapters that differ by less of their largest value are the same, and a comparison could not fail.
ALIKE = 1e-6


class Outcome(NamedTuple):
    """What became of one way: "exact" (and the engine that ran), "refused" by one_pass, "wrong" (another value, or an
    error that is not one_pass's own), or "peft": PEFT itself cannot, so there is nothing to compare with."""

    kind: str
    said: str


def adapted(bare: nn.Module, configs: Sequence[peft.PeftConfig], seed: int = 0) -> nn.Module:
    """Return a PEFT model of a copy of ``bare`` with adapters task0, task1, …, none of which is as it began."""
    mixed = len({config.peft_type for config in configs}) > 1
    model = peft.get_peft_model(copy.deepcopy(bare), configs[0], adapter_name="task0", mixed=mixed)
    for task, config in enumerate(configs[1:], 1):
        model.add_adapter(f"task{task}", config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{adapter}" in name for adapter in model.peft_config) and parameter.is_floating_point():
                # By rows about as long whatever their size: OFT's series converges for small angles alone.
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.5 * noise / math.prod(parameter.shape[1:]) ** 0.5)
    return model.eval()


def loop(model: nn.Module, given: dict) -> list:
    """Return PEFT's output for each adapter."""
    outputs = []
    for adapter in model.peft_config:
        model.set_adapter(adapter)
        outputs.append(model(**given))
    return outputs


@torch.no_grad()
def in_one_call(model: nn.Module, given: dict) -> Outcome:
    return _judged(lambda: _stacked(loop(model, given)), lambda: _called(fastcss.one_pass(model), given))


@torch.no_grad()
def with_a_route(model: nn.Module, given: dict) -> Outcome:
    """Run a batch of three: with the last adapter, with none and with the first; PEFT runs each sample alone."""
    adapters = list(model.peft_config)
    route = torch.tensor([len(adapters) - 1, -1, 0])
    def expected() -> list[Tensor]:
        outputs = []
        for sample, task in enumerate(route.tolist()):
            one = {name: tensor[sample : sample + 1] for name, tensor in given.items()}
            if task < 0:
                with model.disable_adapter():
                    outputs.append(tensors(model(**one)))
            else:
                model.set_adapter(adapters[task])
                outputs.append(tensors(model(**one)))
        return [torch.cat(leaves) if leaves[0].dim() else torch.stack(leaves) for leaves in zip(*outputs, strict=True)]

    return _judged(expected, lambda: _called(fastcss.one_pass(model), given, route=route), differ=False)


@torch.no_grad()
def from_folders(bare: nn.Module, model: nn.Module, given: dict, folder: Path) -> Outcome:
    """Save all adapters by PEFT and run them over the bare model; PEFT loads each alone into a fresh copy of that."""
    folders = [folder / adapter for adapter in model.peft_config]

    def expected() -> list[Tensor]:
        model.save_pretrained(folder)
        models = (peft.PeftModel.from_pretrained(copy.deepcopy(bare), each) for each in folders)
        return _stacked([each.eval()(**given) for each in models])

    return _judged(expected, lambda: _called(fastcss.one_pass.from_directories(bare, folders), given))


def in_training(model: nn.Module, given: dict) -> Outcome:
    """Compare the gradients that every adapter gets of the sum of all outputs' squares, in the model's present mode."""
    adapters, models = list(model.peft_config), (copy.deepcopy(model), copy.deepcopy(model))

    def gradients(of: nn.Module, outputs: list) -> list[Tensor]:
        sum(tensor.square().sum() for tensor in tensors(outputs) if tensor.is_floating_point()).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in of.parameters() if p.requires_grad]

    def expected() -> list[Tensor]:
        outputs = []
        for adapter in adapters:
            models[0].set_adapter(adapter)
            models[0].set_requires_grad(adapters)
            outputs.append(models[0](**given))
        return gradients(models[0], outputs)

    def got() -> tuple[str, list[Tensor]]:
        models[1].set_requires_grad(adapters)
        runner = fastcss.one_pass(models[1])
        outputs = runner(**given)
        return runner.engine, gradients(models[1], [outputs])

    return _judged(expected, got, differ=False)


@torch.no_grad()
def exported(model: nn.Module, given: dict) -> Outcome:
    def got() -> tuple[str, list[Tensor]]:
        runner = fastcss.one_pass(model)
        program = torch.export.export(runner, (), given)
        return runner.engine, tensors(program.module()(**given))

    return _judged(lambda: _stacked(loop(model, given)), got)


# ---------------------------------------------------------------------------------------------------------------------


def _judged(
    expected: Callable[[], list[Tensor]], got: Callable[[], tuple[str, list[Tensor]]], differ: bool = True
) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = expected()
        except Exception as error:
            return Outcome("peft", first_line(error))
        apart = max(_apart(tensor) for tensor in wanted) if differ else 1.0
        if apart < ALIKE:
            return Outcome("alike", "the adapters give the same in PEFT, so that this compares nothing")
        try:
            engine, found = got()
        except Exception as error:
            return Outcome("refused" if str(error).startswith("one_pass") else "wrong", first_line(error))
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=True)):
        return Outcome("wrong", f"shapes {[list(t.shape) for t in found]}, PEFT {[list(t.shape) for t in wanted]}")
    error = max(map(_error, found, wanted))
    return Outcome("exact", engine) if error <= min(EXACT, apart / 10) else Outcome("wrong", f"error {error:.1e} of the largest value")


def _called(runner: fastcss.one_pass, given: dict, **options) -> tuple[str, list[Tensor]]:
    outputs = tensors(runner(**given, **options))
    return runner.engine, outputs


def tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _stacked(outputs: list) -> list[Tensor]:
    return [torch.stack(leaves) for leaves in zip(*map(tensors, outputs), strict=True)]


def _apart(tensor: Tensor) -> float:
    """Return how far the first and last entries are apart, of their largest value; a single one has nothing beside."""
    if len(tensor) < 2 or not tensor.numel():
        return 1.0
    return float((tensor[0].double() - tensor[-1].double()).abs().max() / tensor.double().abs().max())


def _error(found: Tensor, wanted: Tensor) -> float:
    if torch.equal(found, wanted) or not wanted.numel():
        return 0.0
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return float("inf") if error.isnan() else float(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
