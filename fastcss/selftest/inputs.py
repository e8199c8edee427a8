"""Makes a small call of every op, of odd sizes. Each choice of an op is further from a tie than any dtype rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from .._cosine import unit
from ..packed_lora import PackedLora
from .comparison import Call, normal

IGNORED = 255
RANKS, SCALES = (3, 0, 5), (0.5, 1.0, 2.0)


def multi_lora(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, **options) -> Tensor:
    """Call ``multi_lora`` with tensors alone: the adapters are packed row by row."""
    lora = PackedLora.pack(a.split(RANKS), [rows.mT for rows in b.split(RANKS)], SCALES)
    return ops.multi_lora(x, weight, lora, bias, **options)


def _multi_lora(*batch: int, **options) -> Call:
    shapes = {"x": (*batch, 19), "weight": (33, 19), "bias": (33,), "a": (sum(RANKS), 19), "b": (sum(RANKS), 33)}
    return Call(multi_lora, {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}, options)


def _affinity(op: Callable, *, centers: bool = False, **options) -> Call:
    """Make logits q · k of standard deviation 2, so that the sigmoid is steep for some pairs and flat for others."""
    tensors = {"q": normal(2, 37, 5), "k": normal(2, 37, 5, seed=1)}
    if op is not ops.affinity_loss:
        tensors["feats" if centers else "v"] = normal(2, 37, 21, seed=2) * (0.1 if centers else 1)
    if centers:
        tensors["centers"] = normal(2, 7, 21, seed=3)
    return Call(op, tensors, options)


def _labels(*shape: int) -> Tensor:
    """Draw labels of 7 classes, and ignore every fifth."""
    labels = torch.randint(7, shape, generator=torch.Generator().manual_seed(0))
    labels[..., ::5] = IGNORED
    return labels


def _class_centers(over: str) -> Call:
    return Call(ops.class_centers, {"logits": 2 * normal(2, 7, 37), "feats": normal(2, 37, 21, seed=1)}, {"over": over})


def pack_text(image: Tensor, text: Tensor, k: int, *, impl: str) -> ops.FilteredCost:
    """Pack the text, and return the cost map that it is packed for."""
    return ops.cost_filter(image, ops.pack_text(text, impl=impl), k, impl=impl)


def _cost_filter(op: Callable) -> Call:
    """Make one pixel the first axis, with which the classes have cosines of 0.98, 0.92, …. Every other pixel has a part
    along the second axis, which keeps it away from all text."""
    image, text = unit(normal(2, 3, 5, 33)), normal(9, 2, 33, seed=1)
    text[..., :2], image[..., 0], image[..., 1] = 0, 0, 2
    image[:, -1, 0] = torch.eye(33)[0]
    text = unit(text)
    cosine = torch.linspace(0.98, 0.5, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(2))]
    text[:, 0] *= (1 - cosine.square()).sqrt()[:, None]
    text[:, 0, 0] = cosine
    return Call(op, {"image": image, "text": 3 * text}, {"k": 4})


def _select_tokens() -> Call:
    """Put two of three tokens near a class, and the others on its far side."""
    classes = normal(2, 5, 33)
    tokens = classes[:, torch.arange(37) % 5] + 0.3 * normal(2, 37, 33, seed=1)
    tokens[:, ::3] *= -1
    return Call(ops.select_tokens, {"tokens": tokens, "classes": classes}, {"threshold": 0.75, "length": 150})


def _prompt_mlp() -> Call:
    """Put half of the hidden units well below the bend of the ReLU and half above; some rows have no class."""
    shapes = {"z": (11, 21), "w1": (3, 21, 18), "b1": (3, 18), "w2": (3, 18, 33), "b2": (3, 33)}
    tensors = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["w1"] *= 0.1
    tensors["b1"] = 4 * tensors["b1"].sign()
    return Call(ops.prompt_mlp, tensors, {"index": torch.arange(11) % 4 - 1})


def _merge_masks() -> Call:
    """Take a seed with which no logit of the 35 pixels is near the threshold."""
    tensors = {"masks": normal(2, 5, 7, seed=277), "scores": torch.tensor([0.3, 0.8])}
    return Call(ops.merge_masks, tensors, {"size": (5, 7), "crop": (17, 27)})


def _topk_queries() -> Call:
    """Put the tokens along their prototypes, with scores that are 10% apart."""
    prototypes = normal(5, 21)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    score = 1.1 ** order.float() / prototypes.square().sum(1)[order % 5]
    features = (score[:, None] * prototypes[order % 5]).expand(2, -1, -1) * torch.tensor([1.0, 2.0])[:, None, None]
    return Call(ops.topk_queries, {"features": features, "prototypes": prototypes}, {"k": 6})


def _top_margin() -> Call:
    return Call(ops.top_margin, {"logits": 2 * normal(2, 7, 37)}, {"labels": _labels(2, 37)})


def _deformable_attention() -> Call:
    """Keep the points in the middle part of their cells, because the gradient jumps at a border."""
    shapes, queries, heads, points = [(5, 7), (3, 4)], 9, 2, 3
    size = torch.tensor([(w, h) for h, w in shapes])  # [levels, 2]
    generator = torch.Generator().manual_seed(0)
    cell = (torch.rand(2, queries, 2, 2, generator=generator) * (size + 1)).floor() - 1
    offsets = (2 * normal(2, queries, heads, 2, points, 2)).round()
    offsets += 0.6 * torch.rand(offsets.shape, generator=generator) - 0.3
    tensors = {
        "value": normal(2, 5 * 7 + 3 * 4, heads, 17, seed=1),
        "reference_points": (cell + 1) / size,
        "offsets": offsets,
        "logits": normal(2, queries, heads, 2, points, seed=2),
    }
    return Call(ops.deformable_attention, tensors, {"spatial_shapes": shapes})


def _bi_attention() -> Call:
    tokens = {"q": 37, "k": 6, "v_image": 37, "v_text": 6}
    tensors = {name: normal(2, count, 3, 17, seed=i) for i, (name, count) in enumerate(tokens.items())}
    masks = {"text_mask": torch.arange(6) % 3 == 2, "image_mask": torch.arange(37) % 3 == 1}
    return Call(ops.bi_attention, tensors, {name: mask.expand(2, -1) for name, mask in masks.items()})


def _window_attention() -> Call:
    shapes = (
        dict.fromkeys("qkv", (2, 5, 7, 3, 17))
        | {"bias": (3, 16, 16)}
        | dict.fromkeys(("pad_key", "pad_value"), (3, 17))
    )
    tensors = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return Call(ops.window_attention, tensors, {"window": 4, "shift": 2})


def _relative_attention(window: int | None) -> Call:
    rows, columns = (9, 13) if window is None else (2 * window - 1, 2 * window - 1)
    shapes = (
        dict.fromkeys("qkv", (2, 5, 7, 3, 17))
        | {"rel_h": (rows, 17), "rel_w": (columns, 17)}
        | dict.fromkeys(("pad_key", "pad_value"), (3, 17))
    )
    tensors = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return Call(ops.relative_attention, tensors, {"window": window})


#: name → the call, in float32 on a CPU. The name starts with that of the op.
CALLS: dict[str, Callable[[], Call]] = {
    "multi_lora, shared": lambda: _multi_lora(2, 37, mode="shared"),
    "multi_lora, diverged": lambda: _multi_lora(3, 37, mode="diverged"),
    "multi_lora, routed": lambda: _multi_lora(4, 37, mode="routed", index=torch.tensor([2, -1, 0, 1])),
    "class_affinity": lambda: _affinity(ops.class_affinity, centers=True),
    "affinity_attention": lambda: _affinity(ops.affinity_attention, mean=True),
    "affinity_loss": lambda: _affinity(ops.affinity_loss, labels=_labels(2, 37)),
    "class_centers, over pixels": lambda: _class_centers("pixels"),
    "class_centers, over classes": lambda: _class_centers("classes"),
    "cost_filter": lambda: _cost_filter(ops.cost_filter),
    "pack_text": lambda: _cost_filter(pack_text),
    "top_classes": lambda: Call(ops.top_classes, {"score": normal(3, 41)}, {"k": 7}),
    "select_tokens": _select_tokens,
    "phrase_pool": lambda: Call(ops.phrase_pool, {"cls": normal(3, 33), "phrases": normal(5, 7, 33, seed=1)}),
    "prompt_mlp": _prompt_mlp,
    "merge_masks": _merge_masks,
    "topk_queries": _topk_queries,
    "top_margin": _top_margin,
    "deformable_attention": _deformable_attention,
    "bi_attention": _bi_attention,
    "window_attention": _window_attention,
    "relative_attention, map": lambda: _relative_attention(None),
    "relative_attention, windows": lambda: _relative_attention(4),
}
