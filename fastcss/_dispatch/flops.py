"""FLOPs of the raw ops, for torch.utils.flop_counter, which knows only torch's own."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import _schema  # noqa: F401  defines the ops

# Arguments arrive as their shapes, in the order of the schemas in _schema. A routed slot counts the largest rank:
# which adapter it takes is not in the shapes.


@register_flop_formula(torch.ops.fastcss.multi_lora)
def multi_lora(x, weight, bias, lora_a, lora_b, offsets, scales, index, max_rank, save_h, **_) -> int:
    width_out, width_in = weight
    base_rows = math.prod(x[:-1])
    slot_rows = (scales if index is None else index)[0] * x[-2]
    rank_rows = x[-2] * lora_a[0] if index is None else slot_rows * max_rank
    return 2 * (base_rows * width_in * width_out + rank_rows * (width_in + width_out))


@register_flop_formula(torch.ops.fastcss.multi_lora_backward)
def multi_lora_backward(
    dy, x, weight, lora_a, lora_b, offsets, scales, index, h, max_rank, need_dx, need_dlora, **_
) -> int:
    width_out, width_in = weight
    rank_rows = x[-2] * lora_a[0] if index is None else dy[0] * dy[1] * max_rank
    flops = rank_rows * width_out  # dy Bᵀ, which both results need
    if need_dx:
        flops += math.prod(x[:-1]) * width_in * width_out + rank_rows * width_in
    if need_dlora:
        flops += rank_rows * (width_in + width_out)
    return 2 * flops


@register_flop_formula(torch.ops.fastcss.affinity_attention)
def affinity_attention(q, k, v, scale, mean, **_) -> int:
    batch, pixels, width = q
    return 2 * batch * pixels**2 * (width + v[2])


@register_flop_formula(torch.ops.fastcss.affinity_attention_backward)
def affinity_attention_backward(dintra, dinter, q, k, v, scale, mean, **_) -> int:
    batch, pixels, width = q
    return 2 * batch * pixels**2 * (3 * width + 2 * v[2])


@register_flop_formula(torch.ops.fastcss.class_affinity)
def class_affinity(q, k, feats, centers, scale, mean, save_tp, **_) -> int:
    batch, pixels, width = q
    classes, channels = centers[1:]
    return 2 * batch * (pixels**2 * (width + classes) + 3 * pixels * channels * classes)


@register_flop_formula(torch.ops.fastcss.class_affinity_backward)
def class_affinity_backward(dintra, dinter, q, k, feats, centers, tp, scale, mean, **_) -> int:
    batch, pixels, width = q
    classes, channels = centers[1:]
    return 2 * batch * (pixels**2 * (3 * width + 2 * classes) + 6 * pixels * channels * classes)


@register_flop_formula(torch.ops.fastcss.affinity_loss)
def affinity_loss(q, k, labels, scale, ignore_index, **_) -> int:
    batch, pixels, width = q
    return 2 * batch * pixels**2 * width


@register_flop_formula(torch.ops.fastcss.affinity_loss_backward)
def affinity_loss_backward(dloss, q, k, labels, scale, ignore_index, **_) -> int:
    return 3 * affinity_loss(q, k, labels, scale, ignore_index)


@register_flop_formula(torch.ops.fastcss.class_centers)
def class_centers(logits, feats, over_classes, **_) -> int:
    return 2 * math.prod(logits) * feats[2]


@register_flop_formula(torch.ops.fastcss.class_centers_backward)
def class_centers_backward(dcenters, logits, feats, centers, class_lse, pixel_lse, **_) -> int:
    return 4 * math.prod(logits) * feats[2]


@register_flop_formula(torch.ops.fastcss.cost_filter)
def cost_filter(image, text, scale, panels, k, **_) -> int:
    """All classes' costs, and the kept ones' once more."""
    return 2 * math.prod(image) * text[2] * (text[1] + k)


@register_flop_formula(torch.ops.fastcss.cost_filter_backward)
def cost_filter_backward(dcost, image, text, cost, index, **_) -> int:
    return 4 * math.prod(cost) * image[3]


@register_flop_formula(torch.ops.fastcss.phrase_pool)
def phrase_pool(cls, phrases, **_) -> int:
    return 4 * cls[0] * math.prod(phrases)


@register_flop_formula(torch.ops.fastcss.phrase_pool_backward)
def phrase_pool_backward(dpooled, cls, phrases, **_) -> int:
    return 10 * cls[0] * math.prod(phrases)


@register_flop_formula(torch.ops.fastcss.select_tokens)
def select_tokens(tokens, classes, threshold, length, best_only, **_) -> int:
    return 2 * math.prod(tokens) * classes[1]


@register_flop_formula(torch.ops.fastcss.prompt_mlp)
def prompt_mlp(z, w1, b1, w2, b2, index, **_) -> int:
    return 2 * z[0] * (math.prod(w1[1:]) + math.prod(w2[1:]))


@register_flop_formula(torch.ops.fastcss.prompt_mlp_backward)
def prompt_mlp_backward(dy, z, w1, w2, index, hidden, need_dz, need_weights, **_) -> int:
    first, second = math.prod(w1[1:]), math.prod(w2[1:])
    return 2 * z[0] * (second + need_dz * first + need_weights * (first + second))


@register_flop_formula(torch.ops.fastcss.topk_queries)
def topk_queries(features, prototypes, bias, k, **_) -> int:
    return 2 * math.prod(features) * prototypes[0]


@register_flop_formula(torch.ops.fastcss.deformable_attention)
def deformable_attention(value, shapes, reference_points, offsets, logits, **_) -> int:
    """Four corners of each point."""
    return 8 * math.prod(logits) * value[3]


@register_flop_formula(torch.ops.fastcss.deformable_attention_backward)
def deformable_attention_backward(dout, value, shapes, reference_points, offsets, logits, need_reference, **_) -> int:
    return 2 * deformable_attention(value, shapes, reference_points, offsets, logits)


@register_flop_formula(torch.ops.fastcss.bi_attention)
def bi_attention(q, k, v_image, v_text, text_mask, image_mask, scale, group, **_) -> int:
    return 6 * math.prod(q) * k[1]


@register_flop_formula(torch.ops.fastcss.bi_attention_backward)
def bi_attention_backward(dimage, dtext, q, k, *_, **__) -> int:
    return 14 * math.prod(q) * k[1]


@register_flop_formula(torch.ops.fastcss.window_attention)
def window_attention(q, k, v, bias, pad_key, pad_value, window, shift, scale, **_) -> int:
    return 4 * _padded(q, window) * window**2


@register_flop_formula(torch.ops.fastcss.window_attention_backward)
def window_attention_backward(dout, q, k, v, bias, pad_key, pad_value, window, shift, scale, need_bias, **_) -> int:
    return 10 * _padded(q, window) * window**2


def _padded(q, window: int) -> int:
    """Elements of ``q`` with its padding up to whole windows."""
    batch, height, width, *channels = q
    return batch * math.prod(channels) * math.prod(-(-size // window) * window for size in (height, width))
