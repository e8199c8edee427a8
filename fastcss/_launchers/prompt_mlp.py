from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.nvrtc import WARP, blocks, constant, launch, launcher


@launcher
def prompt_mlp(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    file, rows = "prompt_mlp.cuh", len(z)
    columns = constant(file, "kColumnBytes") // z.element_size()
    hidden, y = z.new_empty((rows, w1.shape[2]), dtype=torch.float32), z.new_empty(rows, w2.shape[2])
    for name, x, weight, bias, out in (("hidden", z, w1, b1, hidden), ("output", hidden, w2, b2, y)):
        launch(
            file, f"prompt_mlp_{name}", z.dtype, (rows, blocks(weight.shape[2], columns)),
            *(x, *x.stride(), weight, *weight.stride(), bias, *bias.stride()),
            *(index, *index.stride(), *weight.shape, out),
        )  # fmt: skip
    return y, hidden


@launcher
def prompt_mlp_backward(
    dy: Tensor, z: Tensor, w1: Tensor, w2: Tensor, index: Tensor, hidden: Tensor, need_dz: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, inputs), (classes, width, outputs) = z.shape, w2.shape
    shapes = (w1.shape, (classes, width), w2.shape, (classes, outputs)) if need_weights else ((0,),) * 4
    dz, dhidden, hidden = z.new_empty(z.shape if need_dz else (0,)), hidden.new_empty(hidden.shape), hidden.contiguous()
    dw1, db1, dw2, db2 = (w1.new_empty(shape) for shape in shapes)
    file, warps = "prompt_mlp.cuh", constant("prompt_mlp.cuh", "kThreads") // WARP
    layers = (("dhidden", dy, w2, hidden, dhidden), ("dz", dhidden, w1, None, dz))
    for name, x, weight, positive, out in layers if need_dz else layers[:1]:
        launch(
            file, f"prompt_mlp_{name}", z.dtype, (rows, blocks(weight.shape[1], warps)),
            *(x, *x.stride(), weight, *weight.stride(), positive, index, *index.stride()),
            *(classes, weight.shape[2], weight.shape[1], out),
        )  # fmt: skip
    file = "prompt_mlp_backward.cuh"
    layers = (("dw1", z, dhidden, dw1, db1), ("dw2", hidden, dy, dw2, db2))
    for name, x, slope, dweight, dbias in layers if need_weights else ():
        inputs, outputs = x.shape[1], slope.shape[1]
        columns, height = blocks(outputs, constant(file, "kColumns")), blocks(max(inputs, 1), constant(file, "kRows"))
        launch(
            file, f"prompt_mlp_{name}", z.dtype, (columns, height, classes),
            *(x, *x.stride(), slope, *slope.stride(), index, *index.stride(), rows, inputs, outputs, dweight, dbias),
        )  # fmt: skip
    return dz, dw1, db1, dw2, db2
