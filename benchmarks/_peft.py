"""Runs the adapters of one layer by PEFT: in turn, or as its mixed batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._lora_layer import Layer
from .cases import Step


def layer(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> nn.Module:
    """Make the layer of the base ``weight`` [N, K] with an adapter for each of ``a`` [T, r, K] and ``b`` [T, r, N]."""
    from peft import LoraConfig, get_peft_model

    t, r, k = a.shape
    linear = nn.ModuleDict({"layer": nn.Linear(k, weight.shape[0])})
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"])
    model = get_peft_model(linear, config, adapter_name="task0")
    for task in range(1, t):
        model.add_adapter(f"task{task}", config)
    adapted = linear["layer"].to(weight)
    with torch.no_grad():
        adapted.base_layer.weight.copy_(weight)
        adapted.base_layer.bias.copy_(bias)
        for task, name in enumerate(names_of(adapted)):
            adapted.lora_A[name].weight.copy_(a[task])
            adapted.lora_B[name].weight.copy_(b[task].t())
    return adapted


def names_of(adapted: nn.Module) -> list[str]:
    """Return the names of the layer's adapters, in the order of their making."""
    return list(adapted.lora_A)


def loop(data: Layer, mode: str) -> Step:
    """Run the adapters one after the other through ``set_adapter``, as a PEFT user does."""
    adapted = layer(data.weight, data.bias, data.a, data.b)
    names = names_of(adapted)

    def run(task: int, x: Tensor) -> Tensor:
        adapted.set_adapter(names[task])
        return adapted(x)

    inputs = [data.x] * data.tasks if data.shared else list(data.x)
    if mode == "fwd":
        return torch.no_grad()(lambda: (torch.stack([run(task, x) for task, x in enumerate(inputs)]),))

    inputs = [x.clone().requires_grad_() for x in inputs]

    def step():
        outputs, gradients = [], []
        for task, (name, x) in enumerate(zip(names, inputs, strict=True)):
            y = run(task, x)
            leaves = (x, adapted.lora_A[name].weight, adapted.lora_B[name].weight)
            gradients.append(torch.autograd.grad(y, leaves, data.dy[task]))
            outputs.append(y.detach())
        dx, da, db = zip(*gradients, strict=True)
        dx = sum(dx) if data.shared else torch.stack(dx)
        return torch.stack(outputs), dx, torch.stack(da), torch.stack([gradient.t() for gradient in db])

    return step


def mixed(adapted: nn.Module, x: Tensor) -> Step:
    """Run PEFT's mixed batch, with one adapter for each sample."""
    adapted, names = adapted.eval(), names_of(adapted)
    return torch.no_grad()(lambda: (adapted(x, adapter_names=names),))
