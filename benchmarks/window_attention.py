"""Cases of ``window_attention``: every layer of a Swin backbone on a picture, the op alone and with its projections.

The model partitions its normed map once, and projects queries, keys and values of the windows; the op takes those of
the map. Neither should pay for the other's order. So the bare op's "eager", "compiled" and "sdpa" are given keys and
values in windows from the start, and bring only the queries there, in place of the model's map. Each layer then pads,
rolls and partitions one tensor, and merges, rolls back and crops one, as in the model. Mode "bwd" is a training step's
share: forward, then the gradients of q, k and v, which stay in windows if they came in windows; biases are frozen.

The case ``-layer`` is what a model feels: transformers' own ``SwinLayer`` with its projections, but without its norms
and MLP (its two sums remain, in every provider), and what ``fastcss.fuse`` makes of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastcss
from fastcss.ops import window_attention

from . import _steps
from .cases import Case, Problem, Step, largest_error

# Errors are relative to the largest expected value. float32 adds up 49 rounded products, and as many as 768 in the
# projections before. bfloat16 has 8 bits for scores of up to 10, and for the attention where it is in memory.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
SOURCES = ("fastcss/_ops/window_attention.py", "fastcss/composed/window_attention.py")
FUSE_SOURCES = ("fastcss/_fuse/*.py",)
WINDOW, WIDTH = 7, 32


def cases(device: str, quick: bool) -> list[Case]:
    """List the point of the specification: Swin-T on a picture of 800 × 1066 pixels, all twelve layers in turn."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name, maps = "window_attention/swin-t-800x1066", [(200, 267), (100, 134), (50, 67), (25, 34)]
    shape = {"B": 1, "maps": maps, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24], "D": WIDTH, "window": WINDOW}
    if quick:
        shape |= {"maps": [(20, 27), (10, 14)], "depths": [2, 2], "heads": [1, 2]}
    bare, whole = (functools.partial(build, shape, dtype, quick) for build in (_problem, _layer_problem))
    ending = "-quick" * quick
    return [
        Case("window_attention", name + ending, shape, dtype, bare, SOURCES),
        Case("window_attention", f"{name}-layer{ending}", shape, dtype, whole, SOURCES + FUSE_SOURCES, modes=("fwd",)),
    ]


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    layers = [Layer.random(block, shape["B"], dtype, device) for block in swin_layers(shape, dtype, device)]

    def in_turn(step_of: Callable[[Layer], Step]) -> Step:
        return _in_turn([step_of(layer) for layer in layers])

    def with_(impl: str) -> Step:
        return in_turn(lambda layer: _steps.step_of(layer.op(impl), layer.maps, [layer.gradient], mode))

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: with_("auto"),
        "eager": lambda: in_turn(lambda layer: layer.model_step(_eager, mode)),
        "sdpa": lambda: in_turn(lambda layer: layer.model_step(_sdpa, mode)),
    }
    if not quick:
        providers["compiled"] = lambda: in_turn(lambda layer: layer.model_step(_eager, mode, compiled=True))
    if device == "cuda":
        providers["composed"] = lambda: with_("composed")
        providers["triton"] = lambda: with_("triton")

    def expected():
        return in_turn(
            lambda layer: lambda: _steps.expected(layer.op("reference"), layer.maps, [layer.gradient], mode)
        )()

    def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Merge gradients that are in windows, and compare."""
        of_tensor = [layer for layer in layers for _ in range(len(expected) // len(layers))]
        maps = [
            layer.merged(a).view(b.shape) if (a.dim(), b.dim()) == (4, 5) else a
            for a, b, layer in zip(got, expected, of_tensor, strict=False)
        ]
        return largest_error(maps, expected) if len(got) == len(expected) else float("inf")

    return Problem(providers, expected, TOLERANCE[dtype], *work(shape, dtype.itemsize, mode), error)


def _layer_problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    blocks = nn.ModuleList(swin_layers(shape, dtype, device))
    sizes = [block.input_resolution for block in blocks]
    maps = [
        _steps.normal(shape["B"], height * width, block.attention.o_proj.in_features, dtype=dtype, device=device)
        for block, (height, width) in zip(blocks, sizes, strict=True)
    ]

    def step(blocks: Sequence[Callable], maps: Sequence[Tensor] = maps) -> Step:
        return torch.no_grad()(lambda: [block(x, size)[0] for block, x, size in zip(blocks, maps, sizes, strict=True)])

    def fused() -> Step:
        copied = copy.deepcopy(blocks)
        fastcss.fuse(copied)
        return step(copied)

    def sdpa() -> Step:
        copied = copy.deepcopy(blocks)
        for block in copied:
            block.attention.config._attn_implementation = "sdpa"
        return step(copied)

    providers: dict[str, Callable[[], Step]] = {"fastcss": fused, "eager": lambda: step(blocks), "sdpa": sdpa}
    if device == "cuda":
        providers["triton"] = lambda: _steps.on("triton", fused())
    if not quick and device == "cuda":  # half a minute of compiling on CPU, where the op alone has this peer
        providers["compiled"] = lambda: step([_compiled(block) for block in blocks])

    def expected():
        return step(copy.deepcopy(blocks).double(), [x.double() for x in maps])()

    return Problem(providers, expected, TOLERANCE[dtype], *layer_work(shape, dtype.itemsize))


@dataclasses.dataclass
class Layer:
    """Holds one layer's inputs.

    Attributes:
        block: transformers' SwinLayer, whose padding, shift and mask the peers run.
        size: height and width of the map.
        maps: q, k and v, [B, H, W, heads, D].
        bias: [heads, window², window²].
        pads: key and value of the tokens that fill up, [heads, D].
        gradient: of the output, [B, H, W, heads · D].
    """

    block: nn.Module
    size: tuple[int, int]
    maps: list[Tensor]
    bias: Tensor
    pads: list[Tensor]
    gradient: Tensor

    @classmethod
    def random(cls, block: nn.Module, batch: int, dtype: torch.dtype, device: str) -> Layer:
        attention, size = block.attention, block.input_resolution
        heads = attention.num_attention_heads
        maps = [_steps.normal(batch, *size, heads, WIDTH, dtype=dtype, device=device) for _ in range(3)]
        pads = [projection.bias.detach().view(heads, WIDTH) for projection in (attention.k_proj, attention.v_proj)]
        gradient = _steps.normal(batch, *size, heads * WIDTH, dtype=dtype, device=device)
        return cls(block, size, maps, attention.relative_position_bias()[0].detach(), pads, gradient)

    def op(self, impl: str) -> Callable[..., tuple[Tensor]]:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            bias, pad_key, pad_value = (tensor.to(q.dtype) for tensor in (self.bias, *self.pads))
            shift = self.block.shift_size
            return (
                window_attention(q, k, v, bias, WINDOW, shift=shift, pad_key=pad_key, pad_value=pad_value, impl=impl),
            )

        return forward

    def model_step(self, attend: Callable[..., Tensor], mode: str, compiled: bool = False) -> Step:
        """Make a step of transformers' arithmetic: q comes as a map, k and v in windows."""

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, padded = self.partitioned(q)
            out = attend(self.block, *(x.transpose(1, 2) for x in (q, k, v)), self.mask(len(q), padded))
            return self.merged(out)

        q, k, v = self.maps
        height, width = self.size
        below, right = -height % WINDOW, -width % WINDOW
        windows = []
        for x, pad in zip((k, v), self.pads, strict=True):
            filled = pad.expand(len(x), height + below, width + right, -1, -1).clone()
            filled[:, :height, :width] = x
            windows.append(self.partitioned(filled)[0].contiguous())
        forward = _compiled(forward) if compiled else forward
        return _steps.step_of(lambda *tensors: (forward(*tensors),), (q, *windows), [self.gradient], mode)

    def partitioned(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """Partition [B, H, W, heads, D] → [windows, window², heads, D], and return the padded map's size, too."""
        from transformers.models.swin.modeling_swin import window_partition

        heads, width = x.shape[3:]
        x, _ = self.block.maybe_pad(x.flatten(3), *x.shape[1:3])
        windows = window_partition(self.block.cyclic_shift(x), WINDOW)
        return windows.view(-1, WINDOW * WINDOW, heads, width), x.shape[1:3]

    def merged(self, windows: Tensor) -> Tensor:
        """Merge [windows, window², heads, D] → [B, H, W, heads · D]."""
        from transformers.models.swin.modeling_swin import window_reverse

        height, width = self.size
        padded = height + -height % WINDOW, width + -width % WINDOW
        windows = windows.reshape(-1, WINDOW, WINDOW, windows.shape[2] * windows.shape[3])
        x = self.block.cyclic_shift(window_reverse(windows, WINDOW, *padded), reverse=True)
        return x if padded == (height, width) else x[:, :height, :width].contiguous()

    def mask(self, windows: int, padded: Sequence[int]) -> Tensor:
        """Return the relative positions' bias; a shifted layer adds the mask of each window."""
        bias = self.bias[None]
        mask = self.block.get_attn_mask(*padded, dtype=bias.dtype, device=bias.device)
        if mask is None:
            return bias
        return bias + mask[None, :, None].expand(windows // len(mask), -1, -1, -1, -1).reshape(-1, 1, *mask.shape[1:])


def swin_layers(shape: dict, dtype: torch.dtype, device: str) -> list[nn.Module]:
    """Build transformers' layers with random weights, every second one shifted, without norms and MLPs."""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(window_size=WINDOW)
    config._attn_implementation = "eager"
    blocks = []
    for size, depth, heads in zip(shape["maps"], shape["depths"], shape["heads"], strict=True):
        for place in range(depth):
            block = SwinLayer(config, heads * WIDTH, size, heads, shift_size=WINDOW // 2 * (place % 2)).eval()
            block.layernorm_before = block.layernorm_after = block.mlp = nn.Identity()
            for name, parameter in block.named_parameters():
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 if name.endswith(".weight") else 1)
            blocks.append(block.requires_grad_(False).to(device, dtype))
    return blocks


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and the bytes of q, k, v and the output in and out of memory.

    The forward pass has the scores and the sums of each token's window. The backward pass has two products for each of
    these; the scores that it may compute again do not count.
    """
    values = _values(shape)
    flops = 4 * WINDOW**2 * values
    return (flops, 4 * values * itemsize) if mode == "fwd" else (3 * flops, (3 * 3 + 2) * values * itemsize)


def layer_work(shape: dict, itemsize: int) -> tuple[float, float]:
    """Count the same with the four projections, and the bytes of the layer's input, output and weights only."""
    values, flops, weights = _values(shape), 0, 0
    for (height, width), depth, heads in zip(shape["maps"], shape["depths"], shape["heads"], strict=True):
        channels = heads * shape["D"]
        flops += depth * 8 * shape["B"] * height * width * channels**2
        weights += depth * 4 * channels**2
    return flops + 4 * WINDOW**2 * values, (2 * values + weights) * itemsize


def _values(shape: dict) -> int:
    """Count the values in one map of every layer."""
    stages = zip(shape["maps"], shape["depths"], shape["heads"], strict=True)
    return sum(shape["B"] * h * w * depth * heads * shape["D"] for (h, w), depth, heads in stages)


def _in_turn(steps: Sequence[Step]) -> Step:
    return lambda: [tensor for step in steps for tensor in step()]


def _compiled(forward: Callable) -> Callable:
    """Compile for this layer's shapes alone, as a whole graph: nothing runs uncompiled unseen past dynamo's limit."""
    return torch.compile(forward, dynamic=False, fullgraph=True)


def _eager(block: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    from transformers.models.swin.modeling_swin import eager_attention_forward

    return eager_attention_forward(block.attention, q, k, v, mask, scaling=block.attention.scaling)[0]


def _sdpa(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
