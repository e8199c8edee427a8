"""Defines pGen, which has a perceptron for each class, from the class's tokens to prompts for SAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import prompt_mlp


class PromptGenerator(nn.Module):
    """Holds the generators of C classes, packed.

    Args:
        classes: number of classes, C.
        length: length of each input, in scalars of the flattened tokens; the paper has 512 (VOC) and 1024 (ADE20K).
        prompt_dim: width D of a prompt embedding.
        prompts: number of embeddings per class.
        hidden: width of the hidden layer.

    Source: DecoupleCSS section 3.3.2, appendix A.3.
    """

    def __init__(
        self, classes: int, *, length: int = 512, prompt_dim: int = 256, prompts: int = 6, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.prompt_dim = prompt_dim
        width = prompts * prompt_dim
        # L_k must not be zeros: it is the whole input of a class without tokens, and nothing would pass the ReLU.
        self.class_embedding = nn.Parameter(torch.empty(classes, length).normal_(std=0.02))
        self.weight_1 = nn.Parameter(torch.empty(classes, length, hidden))
        self.bias_1 = nn.Parameter(torch.zeros(classes, hidden))
        self.weight_2 = nn.Parameter(torch.empty(classes, hidden, width))
        self.bias_2 = nn.Parameter(torch.zeros(classes, width))
        for weight in (self.weight_1, self.weight_2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Generate prompts from ``tokens`` [R, length] of the classes ``index`` [R] → [R, prompts, prompt_dim]."""
        tokens = tokens.to(self.class_embedding.dtype)  # they come from the detector, which may have another dtype
        out = prompt_mlp(
            tokens + self.class_embedding[index], self.weight_1, self.bias_1, self.weight_2, self.bias_2, index
        )
        return out.unflatten(1, (-1, self.prompt_dim))

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes that the generator was made with."""
        classes, length, hidden = self.weight_1.shape
        prompts = self.weight_2.shape[2] // self.prompt_dim
        return {
            "classes": classes, "length": length, "prompt_dim": self.prompt_dim, "prompts": prompts, "hidden": hidden
        }  # fmt: skip

    def weights_per_class(self) -> int:
        """Count the weights of the two matrices, as the paper's appendix A.3 does."""
        return (self.weight_1.numel() + self.weight_2.numel()) // len(self.weight_1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def pack(generators: list[PromptGenerator]) -> PromptGenerator:
    """Pack the classes of several generators, one after the other, into one generator."""
    packed = PromptGenerator.__new__(PromptGenerator)
    nn.Module.__init__(packed)
    packed.prompt_dim = generators[0].prompt_dim
    for name, _ in generators[0].named_parameters():
        value = torch.cat([getattr(generator, name).detach() for generator in generators])
        setattr(packed, name, nn.Parameter(value, requires_grad=False))
    return packed
