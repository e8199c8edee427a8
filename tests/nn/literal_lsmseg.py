"""Makes a small LSMSegHead and its inputs, and has the same network written from the equations."""

import torch
from torch import nn
from torch.nn import functional as F

from fastcss.nn import LSMSegHead

SIZES = {"sam_channels": 5, "guidance_channels": (6, 3), "prompts": 2, "k": 4, "hidden": 8, "heads": 2, "window": 4}


def head(device="cpu", **arguments):
    torch.manual_seed(0)
    module = LSMSegHead(12, **SIZES | {"upsample_channels": (8, 4)} | arguments).to(device)
    for layer in module.modules():  # no weight stays at a value that would hide its being left out
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    if module.sam_channels is not None:
        nn.init.constant_(module.fusion_weight, 0.3)
    return module


def inputs(device="cpu", batch=2, classes=7, prompts=2, h=6, w=9):
    """Draw image, text, sam and guidance."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 12, h, w), (classes, prompts, 12), (batch, 5, 11, 7), (batch, 6, h, w), (batch, 3, 21, 40)]
    image, text, sam, *guidance = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return image, text, sam, guidance


def plain(device="cpu", **arguments):
    """Make a head without SAM and guidance, and its inputs."""
    module = head(device, **{"sam_channels": None, "guidance_channels": ()} | arguments)
    return module, inputs(device)[:2]


def literal(head, image, text, sam=None, guidance=()):
    """Compute the same network from the equations, a class at a time: logits [B, T, H′, W′]."""
    if sam is not None:  # (5.1)
        sam = F.interpolate(head.sam_projection(sam), image.shape[2:], mode="bilinear")
        image = head.fusion_weight * image + (1 - head.fusion_weight) * sam
    results = []
    for b in range(len(image)):
        visual, words = F.normalize(image[b], dim=0), F.normalize(text, dim=-1)
        cost = torch.einsum("dhw,tpd->tphw", visual, words)  # (5.2)
        kept = cost.amax((1, 2, 3)).argsort(descending=True)[: head.category_filter.k]  # (5.3), (5.4)
        words = F.normalize(words[kept].mean(1), dim=-1)  # (5.5)
        maps = head.cost_embedding(cost[kept])  # (5.6), [k, C, h, w]
        visual = head.visual_projection(image[b : b + 1])
        for spatial, classes in zip(head.spatial, head.classes, strict=True):
            for block, shifted in zip(spatial.blocks, (False, True), strict=True):  # W-MSA, then SW-MSA
                maps = literal_window(block, shifted, maps, spatial.guidance_norm(visual[0].permute(1, 2, 0)))
            maps = literal_classes(classes, maps, head.text_projection(words))
        for i, stage in enumerate(head.upsampling):  # (5.9)
            maps = stage.up(maps)
            if guidance:
                guide = stage.projection(guidance[i][b : b + 1])
                guide = F.interpolate(guide, maps.shape[2:], mode="bilinear")
                maps = torch.cat([maps, guide.expand(len(maps), -1, -1, -1)], dim=1)
            maps = stage.rest(F.conv2d(maps, stage.join.weight, padding=1))
        logits = head.segmentation(maps)[:, 0]
        results.append(torch.full((len(text), *logits.shape[1:]), -100.0).to(logits).index_copy(0, kept, logits))
    return torch.stack(results)


def literal_window(block, shifted, maps, guide):
    """Compute (5.7) on ``maps`` [k, C, h, w]: every pixel attends to every pixel of its window."""
    k, c, h, w = maps.shape
    window = [torch.zeros(h, w, dtype=torch.long, device=maps.device) for _ in range(2)]
    for axis, size in enumerate((h, w)):
        side = min(block.window, size)
        shift = side // 2 if shifted and side < size else 0
        number = torch.tensor([(i - shift) // side for i in range(size)], device=maps.device)
        window[axis] += number[:, None] if axis == 0 else number
    same = torch.stack([(n.flatten()[:, None] == n.flatten()) for n in window]).all(0)
    x = maps.permute(0, 2, 3, 1)
    normed = block.norm(x)
    joined = torch.cat([normed, guide.expand(k, -1, -1, -1)], dim=-1)
    query, key = F.linear(joined, block.query_key.weight, block.query_key.bias).reshape(k, h * w, 2, c).unbind(2)
    query, key, value = (
        y.reshape(k, h * w, block.heads, -1).transpose(1, 2) for y in (query, key, block.value(normed))
    )
    weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~same, -torch.inf).softmax(-1)
    x = x + block.out((weights @ value).transpose(1, 2).reshape(k, h, w, c))
    return (x + block.mlp(x)).permute(0, 3, 1, 2)


def literal_classes(block, maps, words):
    """Compute (5.8) on ``maps`` [k, C, h, w]: linear attention as a weighted mean over the classes of a pixel."""
    k, _, h, w = maps.shape
    x = maps.permute(2, 3, 0, 1)  # [h, w, k, C]
    normed = block.norm(x)
    joined = torch.cat([normed, words.expand(h, w, -1, -1)], dim=-1)
    query, key = F.linear(joined, block.query_key.weight, block.query_key.bias).chunk(2, -1)
    query, key, value = (y.unflatten(-1, (block.heads, -1)) for y in (query, key, block.value(normed)))
    affinity = torch.einsum("hwqnd,hwknd->hwnqk", F.elu(query) + 1, F.elu(key) + 1) / k
    attended = torch.einsum("hwnqk,hwknd->hwqnd", affinity, value) / (affinity.sum(-1) + 1e-6).movedim(2, 3)[..., None]
    x = x + attended.flatten(-2)
    return (x + block.mlp(x)).permute(2, 3, 0, 1)
