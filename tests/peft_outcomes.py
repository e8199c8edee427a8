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
def from_folders(bare: nn.Module, models: Sequence[nn.Module], given: dict, folder: Path) -> Outcome:
    """Save the adapters of all ``models`` by PEFT and run them over the bare one; PEFT loads each alone into a copy."""
    folders = [folder / f"model{i}" / name for i, model in enumerate(models) for name in model.peft_config]

    def expected() -> list[Tensor]:
        for i, model in enumerate(models):
            model.save_pretrained(folder / f"model{i}")
        alone = (peft.PeftModel.from_pretrained(copy.deepcopy(bare), each) for each in folders)
        return _stacked([model.eval()(**given) for model in alone])

    names = [f"task{task}" for task in range(len(folders))]
    outcome = _judged(expected, lambda: _called(fastcss.one_pass.from_directories(bare, folders, names=names), given))
    return outcome._replace(said=outcome.said.replace(f"{folder}/", ""))


def in_training(model: nn.Module, given: dict) -> Outcome:
    """Compare the gradients that every adapter gets of the sum of all outputs' squares, in the model's present mode."""
    adapters = list(model.peft_config)
    trained = set()
    for adapter in adapters:
        model.set_adapter(adapter)
        trained |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def train_all(of: nn.Module) -> None:
        """Do what set_requires_grad(adapters) does, which before peft 0.21 misses what lies outside of the layers."""
        for name, parameter in of.named_parameters():
            parameter.requires_grad_(name in trained)

    def gradients(of: nn.Module, outputs: list) -> list[Tensor]:
        sum(tensor.square().sum() for tensor in tensors(outputs) if tensor.is_floating_point()).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in of.parameters() if p.requires_grad]

    def of_loop(dtype: torch.dtype) -> list[Tensor]:
        copied, outputs = copy.deepcopy(model).to(dtype), []
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
        for adapter in adapters:
            copied.set_adapter(adapter)
            train_all(copied)
            outputs.append(copied(**inputs))
        return gradients(copied, outputs)

    def got() -> tuple[str, list[Tensor]]:
        copied = copy.deepcopy(model)
        train_all(copied)
        runner = fastcss.one_pass(copied)
        outputs = runner(**given)
        return runner.engine, gradients(copied, [outputs])

    # A bias in front of a normalisation has a gradient of rounding errors: errors count against others' size as well.
    options = {"differ": False, "of_all": 0.01}
    return _judged(lambda: of_loop(torch.float32), got, lambda: of_loop(torch.float64), **options)


@torch.no_grad()
def exported(model: nn.Module, given: dict) -> Outcome:
    def got() -> tuple[str, list[Tensor]]:
        runner = fastcss.one_pass(model)
        program = torch.export.export(runner, (), given)
        return runner.engine, tensors(program.module()(**given))

    return _judged(lambda: _stacked(loop(model, given)), got)


# ---------------------------------------------------------------------------------------------------------------------


def _judged(
    expected: Callable[[], list[Tensor]],
    got: Callable[[], tuple[str, list[Tensor]]],
    in_float64: Callable[[], list[Tensor]] | None = None,
    differ: bool = True,
    of_all: float = 0.0,
) -> Outcome:
    """Compare what ``got`` returns beside the engine with what PEFT gives, ``expected``.

    Errors count against the tensor's own largest value, or against ``of_all`` of the largest of all. Where rounding
    is larger than ``EXACT``, ours may be twice as far from PEFT's values in float64 as PEFT's are in float32.
    """
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
    floor = of_all * max(map(_largest, wanted))
    error, allowed = _error(found, wanted, floor), min(EXACT, apart / 10)
    if error > allowed and in_float64 is not None:
        truth = in_float64()
        error, allowed = _error(found, truth, floor), 2 * _error(wanted, truth, floor)
    return Outcome("exact", engine) if error <= allowed else Outcome("wrong", f"error {error:.1e}, not {allowed:.1e}")


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
    return _distance(tensor[0], tensor[-1]) / max(_largest(tensor), 1e-30)


def _error(found: list[Tensor], wanted: list[Tensor], floor: float) -> float:
    """Return the largest distance of a tensor, of its largest value."""
    return max(_distance(*pair) / max(_largest(pair[1]), floor, 1e-30) for pair in zip(found, wanted, strict=True))


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinities and NaN are equal to themselves, and infinitely far from the rest."""
    one, other = one.double(), other.double()
    differ = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other).abs()[differ].nan_to_num(math.inf).max()) if differ.any() else 0.0


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
