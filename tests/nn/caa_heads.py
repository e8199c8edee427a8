"""Makes small CAA heads and pictures for them, and has the head's equations written out."""

import torch
from torch import nn

from fastcss.nn import CAAOutput, ClassAwareAffinity


def head(channels=12, classes=5, device="cpu", **arguments):
    torch.manual_seed(0)
    arguments = {"key_channels": 6, "attention_channels": 8} | arguments
    module = ClassAwareAffinity(channels, classes, **arguments).to(device)
    for layer in module.modules():  # no statistic or weight stays at a value that would hide its being left out
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    return module


def picture(device="cpu", batch=2, channels=12, h=5, w=7, classes=5, stride=4):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, channels, h, w, generator=generator)
    labels = torch.randint(classes, (batch, h * stride, w * stride), generator=generator)
    labels[:, :3] = 255
    return features.to(device), labels.to(device)


def literal(module, features):
    """Compute the same network from the equations, with the N×N map and a layer call wherever the figure shows one."""
    b, d, h, w = features.shape
    coarse = module.segmentation(features)
    pixels = features.reshape(b, d, h * w)  # [B, D, N]
    weights = coarse.reshape(b, -1, h * w).softmax(dim=2)
    centers = torch.einsum("bcn,bdn->bcd", weights, pixels)  # (3.1)

    def gather(weighted, name):
        gathered = torch.einsum("bij,bdj->bdi", weighted, pixels) / (h * w)
        x = module.get_submodule(name)(gathered.reshape(b, d, h, w))
        return module.get_submodule(f"{name}_reduce")(torch.cat([features, x], dim=1))

    def attend(x):
        attention = module.center_attention
        query = attention.query(x).flatten(2)
        key, value = (layer(centers.mT[..., None])[..., 0] for layer in (attention.key, attention.value))
        relation = (torch.einsum("ban,bac->bnc", query, key) * query.shape[1] ** -0.5).softmax(dim=2)  # (3.4, 3.6)
        context = torch.einsum("bnc,bac->ban", relation, value)  # (3.5, 3.7)
        context = attention.out(context.reshape(b, -1, h, w))
        return attention.bottleneck(torch.cat([context, x], dim=1)) if attention.bottleneck else context

    if module.context == "centers":  # table 3.2, CC
        q, k, context = None, None, [attend(features)]
    else:
        q, k = (layer(features).reshape(b, -1, h * w) for layer in (module.query, module.key))
        affinity = torch.einsum("bki,bkj->bij", q, k).sigmoid()
        if module.context == "full":
            context = [attend(gather(affinity, "intra")), attend(gather(1 - affinity, "inter"))]  # (3.2), (3.3)
        elif module.context == "affinity":  # table 3.2, SA
            coarse, context = None, [gather(affinity, "intra"), gather(1 - affinity, "inter")]
        else:  # table 3.3
            alike = module.context == "intra"
            context = [attend(gather(affinity if alike else 1 - affinity, module.context))]
        q, k = q.mT, k.mT
    final = module.segmentation(module.fuse(torch.cat([features, *context], dim=1)))  # (3.8)
    return CAAOutput(final, coarse, q, k)
