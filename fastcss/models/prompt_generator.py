"""pGen: for each class a perceptron of its own, from the class's tokens to prompts for SAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import prompt_mlp


class PromptGenerator(nn.Module):
    """The generators of C classes, packed.

    Args:
        classes: C.
        length: of the input of each, scalars of the flattened tokens; the paper has 512 (VOC) and 1024 (ADE20K).
        prompt_dim: D of a prompt embedding.
        prompts: embeddings a class.
        hidden: width of the hidden layer.

    Source: DecoupleCSS section 3.3.2, appendix A.3.
    """

    def __init__(
        self, classes: int, length: int = 512, prompt_dim: int = 256, prompts: int = 6, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.prompt_dim = prompt_dim
        width = prompts * prompt_dim
        # L_k. Not zeros: of a class without tokens it is the whole input, and nothing would pass a ReLU of nothing.
        self.class_embedding = nn.Parameter(torch.empty(classes, length).normal_(std=0.02))
        self.weight_1 = nn.Parameter(torch.empty(classes, length, hidden))
        self.bias_1 = nn.Parameter(torch.zeros(classes, hidden))
        self.weight_2 = nn.Parameter(torch.empty(classes, hidden, width))
        self.bias_2 = nn.Parameter(torch.zeros(classes, width))
        for weight in (self.weight_1, self.weight_2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:
        """``tokens`` [R, length] of the classes ``index`` [R] → [R, prompts, prompt_dim]."""
        tokens = tokens.to(self.class_embedding.dtype)  # the detector, whose they are, may have another
        out = prompt_mlp(
            tokens + self.class_embedding[index], self.weight_1, self.bias_1, self.weight_2, self.bias_2, index
        )
        return out.unflatten(1, (-1, self.prompt_dim))

    @property
    def sizes(self) -> dict[str, int]:
        """What it was made with."""
        classes, length, hidden = self.weight_1.shape
        prompts = self.weight_2.shape[2] // self.prompt_dim
        return {
            "classes": classes, "length": length, "prompt_dim": self.prompt_dim, "prompts": prompts, "hidden": hidden
        }  # fmt: skip

    def weights_per_class(self) -> int:
        """What the paper's appendix A.3 counts: the two matrices."""
        return (self.weight_1.numel() + self.weight_2.numel()) // len(self.weight_1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def pack(generators: list[PromptGenerator]) -> PromptGenerator:
    """The classes of several generators, one after the other, as one."""
    packed = PromptGenerator.__new__(PromptGenerator)
    nn.Module.__init__(packed)
    packed.prompt_dim = generators[0].prompt_dim
    for name, _ in generators[0].named_parameters():
        value = torch.cat([getattr(generator, name).detach() for generator in generators])
        setattr(packed, name, nn.Parameter(value, requires_grad=False))
    return packed
