"""Cases of ``one_pass``: the Grounding DINO encoder with six adapters, all of them run on the same picture.

"fastcss" is the runner with its defaults: its model is fused where that was measured to be faster. "fastcss-unfused"
runs the model's own modules, as torch's peers do. "onnxruntime" and "openvino" loop over T exported models, each with
its adapter merged into it, on a CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import fastcss

from . import _grounding_dino, _onnx_runtime, _openvino, _steps
from ._onnx import OnnxModel
from .cases import Case, Problem, Step

# Errors are relative to the largest value. float32 has the specification's 1e-5; in bfloat16 the loop's own results
# differ by this much between batch sizes.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
TASKS, RANK = 6, 32
ROOMS = ("_one_pass", "_fuse", "_dispatch", "_ops", "composed")
SOURCES = ("fastcss/*.py", *(f"fastcss/{room}/*.py" for room in ROOMS))


def cases(device: str, quick: bool) -> list[Case]:
    size, height, width, dtype = "swin-t", 480, 640, torch.float32
    if device == "cuda":
        height, width, dtype = 800, 1066, torch.bfloat16
    if quick:
        size, height, width = "tiny", 96, 128
    points = [(TASKS, "swin+fusion", ""), (TASKS, "fusion", "-fusion")]
    if device == "cuda":  # these show what each further task costs if launches cost nothing
        points += [(tasks, "swin+fusion", "") for tasks in (1, 2, 4, 8)]
    found = []
    for tasks, sites, ending in points:
        name = f"one_pass/grounding-dino-{height}x{width}-t{tasks}{ending}" + "-quick" * quick
        shape = {"model": size, "sites": sites, "H": height, "W": width, "T": tasks, "r": RANK}
        build = functools.partial(_problem, shape, dtype, quick)
        long = ending == "-fusion" and device == "cpu" and not quick  # four minutes beside the five of the other one
        found.append(Case("one_pass", name, shape, dtype, build, SOURCES, modes=("fwd",), by_name=long))
    return found


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    system = System.random(shape, dtype, device)
    peft_loop = system.peft_loop()
    providers: dict[str, Callable[[], Step]] = {
        "fastcss": system.one_pass,
        "fastcss-unfused": functools.partial(system.one_pass, fuse=False),
        "peft-loop": lambda: peft_loop,
        "vmap-merged": system.vmapped_merged,
    }
    if shape["sites"] == "fusion":  # Swin's windows are a batch of their own, which PEFT's mixed batch cannot match
        providers["peft-mixed"] = system.peft_mixed
    if shape["sites"] != "fusion" or device == "cuda":  # on a CPU the other sites show that vmap-merged is faster
        providers |= {"merged": system.merged_loop, "vmap": system.vmapped}
    if device == "cpu":
        exported = _grounding_dino.onnx_model(system.bare, **system.inputs)
        for engine in (_onnx_runtime, _openvino):
            providers[engine.NAME] = functools.partial(system.exported_loop, engine, exported)
    if device == "cuda":
        providers["triton"] = lambda: _steps.on("triton", system.one_pass(fuse=True))
        if shape["T"] == TASKS and not quick:  # minutes each
            providers["compiled"] = functools.partial(system.merged_loop, torch.compile)
    shared, per_task = split_flops(system.model, system.inputs, shape["sites"])
    shape |= {"gflop_shared": shared / 1e9, "gflop_per_task": per_task / 1e9}
    weights = sum(p.numel() * p.itemsize for p in system.model.parameters())
    capture = _steps.capture_with(system.constants())
    flops = shared + shape["T"] * per_task
    return Problem(providers, peft_loop, TOLERANCE[dtype], flops, weights, capture=capture)


@dataclasses.dataclass
class System:
    """Holds a PEFT model with T adapters named ``task0``, …, the model without them, and one picture with its text."""

    model: nn.Module
    bare: nn.Module
    inputs: dict[str, Tensor]
    names: list[str]

    @classmethod
    def random(cls, shape: dict, dtype: torch.dtype, device: str) -> System:
        from fastcss.models.grounding_dino import GroundingDinoEncoder, add_adapters, phrases_to_ids

        bare = GroundingDinoEncoder.random(shape["model"]).to(device, dtype)
        model = add_adapters(copy.deepcopy(bare).cpu(), shape["T"], shape["r"], shape["sites"]).to(device, dtype)
        pixels = torch.randn(1, 3, shape["H"], shape["W"])
        inputs = {"pixel_values": pixels.to(device, dtype), "input_ids": phrases_to_ids()[0].to(device)}
        return cls(model, bare, inputs, [f"task{task}" for task in range(shape["T"])])

    def constants(self) -> list[Tensor]:
        """List the tensors that are the same in every call: the text, and both models without adapters."""
        base = [p for name, p in self.model.named_parameters() if "lora_" not in name]
        return [self.inputs["input_ids"], *base, *self.model.buffers(), *self.bare.parameters(), *self.bare.buffers()]

    def one_pass(self, fuse: bool | None = None) -> Step:
        runner = fastcss.one_pass(self.model, fuse=fuse)
        return _without_grad(lambda: _tensors(runner(**self.inputs)))

    def peft_loop(self) -> Step:
        """Switch the adapters one after the other, as a PEFT user does today."""

        def step():
            outputs = []
            for name in self.names:
                self.model.set_adapter(name)
                outputs.append(_tensors(self.model(**self.inputs)))
            return _stacked(outputs)

        return _without_grad(step)

    def peft_mixed(self) -> Step:
        """Run PEFT's mixed batch: the picture T times, with one adapter for each sample."""
        tasks = len(self.names)
        repeated = {name: value.expand(tasks, *value.shape[1:]) for name, value in self.inputs.items()}

        def step():
            outputs = _tensors(self.model(**repeated, adapter_names=self.names))
            return tuple(tensor.unsqueeze(1) for tensor in outputs)  # a batch of T is T batches of one

        return _without_grad(step)

    def merged_loop(self, wrap: Callable[[Callable], Callable] = lambda run: run) -> Step:
        """Loop over T models whose adapters are merged; the weights that no adapter touches are kept once."""
        states = [self._merged(name) for name in self.names]
        run = wrap(lambda state: _tensors(functional_call(self.bare, state, (), self.inputs)))
        return _without_grad(lambda: _stacked([run(state) for state in states]))

    def exported_loop(self, engine: ModuleType, exported: OnnxModel) -> Step:
        """Loop over T exported models with merged adapters, as who deploys them does."""
        runs = []
        for name in self.names:
            merged = {_grounding_dino.PREFIX + weight: value for weight, value in self._merged(name).items()}
            runs.append(engine.loaded(exported, merged))
        return lambda: _stacked([run() for run in runs])

    def vmapped(self) -> Step:
        """``torch.vmap`` over stacked adapters: the six lines that share work without this package."""
        model = copy.deepcopy(self.model)  # the loop switches the active adapter of the original
        model.set_adapter(self.names[0])
        return self._vmapped(model, [self._adapter(name) for name in self.names])

    def vmapped_merged(self) -> Step:
        """Do the same over merged weights."""
        return self._vmapped(self.bare, [self._merged(name) for name in self.names])

    def _vmapped(self, model: nn.Module, states: list[dict[str, Tensor]]) -> Step:
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        run = torch.vmap(lambda state: _tensors(functional_call(model, state, (), self.inputs)))
        return _without_grad(lambda: run(stacked))

    def _adapter(self, adapter: str) -> dict[str, Tensor]:
        """Return this adapter's tensors under the names that the first adapter's have."""
        first, mark = f".{self.names[0]}.", f".{adapter}."
        found = {name: p.detach() for name, p in self.model.named_parameters() if "lora_" in name and mark in name}
        return {name.replace(mark, first): p for name, p in found.items()}

    def _merged(self, adapter: str) -> dict[str, Tensor]:
        """Merge the adapted weights of the bare model in float32, and round them once."""
        state = {}
        for name, layer in self.model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                weight = layer.base_layer.weight
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=layer.scaling[adapter])
                state[f"{name}.weight"] = merged.detach().to(weight.dtype)
        return state


def split_flops(model: nn.Module, inputs: dict[str, Tensor], sites: str) -> tuple[float, float]:
    """Count the FLOPs of one task's pass, with adapters: those shared by all tasks, and those of the task alone.

    They are told apart by parts of the model: the text backbone is always shared, the image backbone if no adapter sits
    on it.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs)
    total = counter.get_total_flops()
    parts = ["text_backbone", "text_projection"]
    if sites == "fusion":
        levels = len(model.get_base_model().input_proj_vision)
        parts += ["backbone", *(f"input_proj_vision.{level}" for level in range(levels))]
    found = {
        name.removeprefix(f"{type(model).__name__}.base_model.model."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }
    shared = sum(found[part] for part in parts)
    return shared, total - shared


def _tensors(output) -> tuple[Tensor, Tensor]:
    return output.last_hidden_state_vision, output.last_hidden_state_text


def _stacked(outputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(tensors) for tensors in zip(*outputs, strict=True))


def _without_grad(step: Step) -> Step:
    return torch.no_grad()(step)
