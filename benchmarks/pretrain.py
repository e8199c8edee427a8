"""``python -m benchmarks.pretrain OUT [--work FOLDER]``: pre-trains the small models, on strokes and blobs.

There are four steps, two of them at a time; what is finished is kept in the work folder and not done again:

- features: the detector's backbone draws what it sees: the ink, and each glyph upright in 8×8 pixels;
- detector: its tokens become like the names of the glyphs that they lie on;
- points: SAM segments the glyph that points are on;
- generator: a prompt generator, and SAM, segment the glyph that the detector's tokens are on. Every class's generator
  begins as a copy of it.

OUT becomes a run without tasks, from which ``python -m fastcss train --base OUT`` begins. No digit is seen.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastcss
from fastcss.data.glyphs import GlyphScenes, drawings
from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_folder import save_base
from fastcss.models.decouplecss_loss import mask_loss, token_loss
from fastcss.models.phrases import describe, encode
from fastcss.models.preprocessing import MEAN, STD
from fastcss.models.prompt_generator import PromptGenerator
from fastcss.models.sam import SamSegmenter

from . import small_models
from .small_models import DIM, GLYPHS

SCENES = 12000
#: Each stage has so many steps, and so many pictures in a step.
STEPS = {"features": (6000, 16), "detector": (4000, 16), "points": (3500, 8), "generator": (2500, 8)}
RATES = {"features": 3e-3, "detector": 1.5e-3, "points": 1.5e-3, "generator": 1e-3}
THRESHOLD, PROMPTS, LENGTH, HIDDEN = 0.3, 6, 1024, 32
_LEVELS = (8, 4)  # sides of the detector's maps
_THERE = 1 / 8  # a token is on a glyph if the glyph covers at least this share of its cell


class Scenes:
    """Holds glyph scenes in memory, the same in all processes.

    Attributes:
        images: uint8 ``[SCENES, 3, 128, 128]``.
        labels: int16 ``[SCENES, 128, 128]``, 0 or the number of a glyph.
    """

    def __init__(self, work: Path) -> None:
        path = work / "scenes.safetensors"
        if not path.is_file():
            items = DataLoader(GlyphScenes(SCENES, glyphs=GLYPHS), batch_size=50, num_workers=2)
            images, labels = zip(*(((255 * x).round().byte(), y.short()) for x, y in items), strict=True)
            _keep({"images": torch.cat(images), "labels": torch.cat(labels)}, path)
        tensors = load_file(path)
        self.images, self.labels = tensors["images"], tensors["labels"]
        self._mean, self._std = (torch.tensor(of)[:, None, None] for of in (MEAN, STD))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw normalised pictures [count, 3, 128, 128] with changed colours, and int64 labels."""
        index = torch.randint(SCENES, (count,))
        images = self.images[index].float() / 255
        images = torch.stack([image[torch.randperm(3)] for image in images])
        images = (images - (torch.rand(count, 1, 1, 1) < 0.5).float()).abs()  # some as their negatives
        return (images - self._mean) / self._std, self.labels[index].long()


def features(scenes: Scenes, count: int) -> Iterator[Tensor]:
    """Yield the modules first, then losses of the backbone and its projections."""
    model = small_models.detector()
    upright = torch.stack([drawings(label).mean(0).flatten() for label in range(1, GLYPHS + 1)])  # [G, 64]
    draw = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, 64))
    name, ink = nn.Linear(DIM, GLYPHS), nn.Linear(DIM, 64)
    yield nn.ModuleDict({"model": model, "draw": draw, "name": name, "ink": ink})
    while True:
        images, labels = scenes.draw(count)
        tokens = model.embed_image(F.avg_pool2d(images, 2)).features  # [B, N, D]
        fine = _LEVELS[0]
        bits = F.avg_pool2d((labels > 0).float()[:, None], 2)[:, 0] >= 0.5  # [B, 64, 64]
        bits = bits.unflatten(1, (fine, -1)).unflatten(3, (fine, -1)).transpose(2, 3).flatten(3).flatten(1, 2).float()
        glyph = _only_glyph(labels)
        seen, glyph = tokens[glyph > 0], glyph[glyph > 0] - 1
        yield (
            3 * F.binary_cross_entropy_with_logits(draw(seen), upright[glyph])
            + 0.3 * F.cross_entropy(name(seen), glyph)
            + 2 * F.binary_cross_entropy_with_logits(ink(tokens[:, : fine**2]), bits)
        )


def detector(scenes: Scenes, count: int, model: ClassDetector) -> Iterator[Tensor]:
    """Yield the modules first, then losses of the whole detector, for the glyphs of the batch and a few others."""
    upright = torch.stack([drawings(label).mean(0).flatten() for label in range(1, GLYPHS + 1)])
    words = encode(small_models.tokenizer(), describe(small_models.glyph_names()))
    centres = torch.cat([_centres(side) for side in _LEVELS])  # [N, 2]
    draw, place = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, 64)), nn.Linear(DIM, 2)
    fastcss.fuse(model)
    yield nn.ModuleDict({"model": model, "draw": draw, "place": place})
    while True:
        images, labels = scenes.draw(count)
        classes = torch.cat([labels.flatten(), torch.randint(1, GLYPHS + 1, (8,))]).unique()[1:]
        some = torch.randint(words.input_ids.shape[1], (2,))
        ids, mask = (of[classes - 1][:, some] for of in (words.input_ids, words.attention_mask))
        found = model(F.avg_pool2d(images, 2), phrases=model.embed_phrases(ids, mask))
        cosine = F.normalize(found.tokens, dim=-1) @ F.normalize(found.classes, dim=-1).mT  # [B, N, c]
        share = _shares(labels, classes)
        most, best = share.max(-1)
        on = most >= _THERE
        yield (
            token_loss(cosine.flatten(0, 1), share.flatten(0, 1), THRESHOLD)
            + 0.5 * F.cross_entropy(16 * cosine[on], best[on])
            + F.binary_cross_entropy_with_logits(draw(found.tokens[on]), upright[classes[best[on]] - 1])
            + 0.5 * (place(found.tokens) - centres)[on].abs().mean()  # prompts must be able to say where
        )


def points(scenes: Scenes, count: int) -> Iterator[Tensor]:
    """Yield the modules first, then losses of SAM for six points on each glyph."""
    sam = small_models.segmenter()
    ink = nn.Linear(DIM, 64)
    yield nn.ModuleDict({"sam": sam, "ink": ink})
    while True:
        images, labels = scenes.draw(count)
        embeddings = sam.embed(images)
        bits = (labels > 0).unflatten(1, (16, -1)).unflatten(3, (16, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
        loss = F.binary_cross_entropy_with_logits(ink(embeddings.flatten(2).mT), bits.float())
        masks = [picture == picture.unique()[1:, None, None] for picture in labels]
        prompts = torch.cat([_prompt_of_points(sam, mask) for of in masks for mask in of])
        yield loss + _segmentation_loss(sam, embeddings, prompts, masks)


def generator(scenes: Scenes, count: int, model: ClassDetector, sam: SamSegmenter) -> Iterator[Tensor]:
    """Yield the modules first, then losses of SAM and of a generator that reads the detector's tokens on a glyph."""
    own = PromptGenerator(1, length=LENGTH, prompt_dim=DIM, prompts=PROMPTS, hidden=HIDDEN)
    nn.init.zeros_(own.class_embedding)
    words = encode(small_models.tokenizer(), describe(small_models.glyph_names()))
    model.eval().requires_grad_(False)
    yield nn.ModuleDict({"sam": sam, "generator": own})
    while True:
        images, labels = scenes.draw(count)
        classes = labels.unique()[1:]
        some = torch.randint(words.input_ids.shape[1], (1,))
        ids, mask = (of[classes - 1][:, some] for of in (words.input_ids, words.attention_mask))
        tokens = model(F.avg_pool2d(images, 2), phrases=model.embed_phrases(ids, mask)).tokens
        on = (_shares(labels, classes) >= _THERE) & (torch.rand(*tokens.shape[:2], 1) > 0.15)  # it will miss some, too
        here = [torch.isin(classes, picture).nonzero()[:, 0] for picture in labels]
        masks = [picture == classes[of][:, None, None] for of, picture in zip(here, labels, strict=True)]
        inputs = torch.stack([_flat(tokens[b, on[b, :, k]]) for b, of in enumerate(here) for k in of])
        prompts = own(inputs, torch.zeros(len(inputs), dtype=torch.long))
        yield _segmentation_loss(sam, sam.embed(images), prompts, masks)


def _segmentation_loss(sam: SamSegmenter, embeddings: Tensor, prompts: Tensor, masks: list[Tensor]) -> Tensor:
    """Average over pictures the loss of the masks, at SAM's resolution, and that of SAM's own estimate of their IoU."""
    counts, loss = [len(of) for of in masks], prompts.new_zeros(())
    decoded = (part.split(counts) for part in sam.decode(embeddings, prompts, counts=counts))
    for logits, scores, drawn in zip(*decoded, masks, strict=True):
        found, target = logits.detach() > 0, drawn[:, 1::2, 1::2]
        iou = (found & target).flatten(1).sum(1) / (found | target).flatten(1).sum(1).clamp(min=1)
        loss = loss + mask_loss(logits, target.long()) + F.mse_loss(scores, iou)
    return loss / len(masks)


def _prompt_of_points(sam: SamSegmenter, mask: Tensor) -> Tensor:
    """Encode six points on a mask by SAM's own prompt encoder, [1, 6, D]."""
    ink = mask.nonzero()
    chosen = ink[torch.randint(len(ink), (PROMPTS,))].flip(-1) + 0.5  # (x, y)
    labels = torch.ones(1, 1, PROMPTS, dtype=torch.long)
    return sam.model.prompt_encoder(chosen[None, None], labels, None, None)[0][0, :, :PROMPTS]


def _flat(tokens: Tensor) -> Tensor:
    """Flatten tokens, and cut them or fill up with zeros, as ``select_tokens`` does."""
    values = tokens.flatten()[:LENGTH]
    return F.pad(values, (0, LENGTH - len(values)))


def _cells(labels: Tensor, side: int) -> Tensor:
    """Split labels into cells: [B, 128, 128] → [B, side², pixels of a cell]."""
    return labels.unflatten(1, (side, -1)).unflatten(3, (side, -1)).transpose(2, 3).flatten(3).flatten(1, 2)


def _shares(labels: Tensor, classes: Tensor) -> Tensor:
    """Compute how much of each token's cell shows each class, [B, N, c]."""
    cells = [_cells(labels, side) for side in _LEVELS]
    return torch.cat([torch.stack([(of == k).float().mean(-1) for k in classes], -1) for of in cells], 1)


def _only_glyph(labels: Tensor) -> Tensor:
    """Return the glyph of each token whose cell shows only that one, and enough of it; else 0: [B, N]."""
    cells = [_cells(labels, side) for side in _LEVELS]
    one = [torch.where(((of == 0) | (of == of.amax(-1, keepdim=True))).all(-1), of.amax(-1), 0) for of in cells]
    there = [(of > 0).float().mean(-1) >= _THERE for of in cells]
    return torch.cat(one, 1) * torch.cat(there, 1)


def _centres(side: int) -> Tensor:
    middle = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(middle, middle)


def run(step: str, work: Path, seed: int, losses: Callable[..., Iterator], *models: nn.Module) -> nn.ModuleDict:
    """Train what the step trains, or read it if that was done before; return its modules."""
    torch.manual_seed(seed)
    path, (steps, count) = work / f"{step}.safetensors", STEPS[step]
    if path.is_file():
        modules = next(losses(None, count, *models))
        modules.load_state_dict(load_file(path))
        return modules
    stream = losses(Scenes(work), count, *models)
    modules, began, recent = next(stream).train(), time.perf_counter(), []
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    for done in range(steps):
        warm, left = min(1, (done + 1) / 200), 0.5 + 0.5 * math.cos(math.pi * done / steps)
        optimizer.param_groups[0]["lr"] = RATES[step] * warm * left
        optimizer.zero_grad()
        loss = next(stream)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (done + 1) % 250 == 0:
            mean, recent = sum(recent) / len(recent), []
            print(f"{step} {done + 1}/{steps}: loss {mean:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    _keep(modules.state_dict(), path)
    return modules


def _detector_chain(work: Path, seed: int) -> None:
    torch.set_num_threads(1)
    run("detector", work, seed, detector, run("features", work, seed, features)["model"])


def _points_chain(work: Path, seed: int) -> None:
    torch.set_num_threads(1)
    run("points", work, seed, points)


def pretrain(out: Path, work: Path, seed: int = 0) -> None:
    """Run all four steps, and make ``out`` from them."""
    work.mkdir(parents=True, exist_ok=True)
    Scenes(work)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for chain in [pool.submit(of, work, seed) for of in (_detector_chain, _points_chain)]:
            chain.result()
    finish(out, work, seed)


def finish(out: Path, work: Path, seed: int) -> None:
    """Run the last step and make ``out``, from what the other steps have left in the work folder."""
    found = run("detector", work, seed, detector, small_models.detector())["model"]
    sam = run("points", work, seed, points)["sam"]
    last = run("generator", work, seed, generator, found, sam)
    torch.manual_seed(seed)
    small_models.name_digits(found)
    model = DecoupleCSS(
        found.eval(), last["sam"].eval(), threshold=THRESHOLD, length=LENGTH, prompts=PROMPTS, hidden=HIDDEN, rank=8,
        alpha=16, sites="convnext+fusion", initial_generator=last["generator"],
    )  # fmt: skip
    save_base(model, out, tokenizer=small_models.tokenizer())


def _keep(tensors: dict[str, Tensor], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, unfinished)  # some share their memory
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the run to begin; it must not be there yet")
    parser.add_argument("--work", type=Path, default=Path("out/pretrain"), help="folder of what is finished")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    options = parser.parse_args(arguments)
    if (options.out / "config.json").exists():
        parser.error(f"{options.out} holds a run already")
    pretrain(options.out, options.work, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
