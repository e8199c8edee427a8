"""A user's program as mypy reads it (``make lint``); nothing runs it.

What is right must pass. What is wrong is marked as the error that it is: where an annotation has become too loose to
show it, the mark is unused, and that is an error, too (``warn_unused_ignores``).
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from typing_extensions import assert_type

import fastcss
from fastcss import PackedLora, ops
from fastcss import nn as heads
from fastcss.data import VOC, ContinualMetrics, DigitScenes, tasks, training_set
from fastcss.models import continual, continual_evaluation
from fastcss.models.class_detector import ClassDetector, DetectedClasses
from fastcss.models.continual_plan import Plan
from fastcss.models.decouplecss import DecoupleCSS, Phrases, Segmentation
from fastcss.models.decouplecss_folder import load, save_task
from fastcss.models.decouplecss_training import Recipe
from fastcss.models.grounding_dino import GroundingDinoEncoder
from fastcss.models.phrases import describe
from fastcss.models.preprocessing import Picture, preprocess
from fastcss.models.sam import Masks, SamSegmenter


def one_pass_and_fuse(model: nn.Module, picture: Tensor, folder: Path) -> None:
    runner = fastcss.one_pass(model, engine="replay", group_size=2, task_dim=1)
    assert_type(runner.adapters, tuple[str, ...])
    assert_type(runner.engine, str)
    runner.forward(picture, adapters=["task0"], per_adapter={"phrases": picture})
    runner.forward(picture, adapters=0)  # type: ignore[arg-type]
    runner.forward(picture, route=["task0", None])
    runner.forward(picture, route=[0, -1])  # type: ignore[list-item]
    pool = fastcss.AdapterPool(model, [folder, "runs/task1"], budget=2**30)
    assert_type(pool.resident, tuple[str, ...])
    pool.forward(picture, route=["task1", None])
    fastcss.AdapterPool(model, [folder], budget="2 GiB")  # type: ignore[arg-type]
    read = fastcss.one_pass.from_directories(model, [folder, "runs/task1"], names=["a", "b"])
    assert_type(read.refresh(), None)
    assert_type(read.add(folder, name="c"), None)
    read.swap("c", "runs/task2")
    read.set_scale("c", "half")  # type: ignore[arg-type]
    read.remove(0)  # type: ignore[arg-type]
    fastcss.one_pass.from_directories(model, [folder], ["a"])  # type: ignore[call-arg]
    fastcss.one_pass(model, "vmap")  # type: ignore[call-arg]
    fastcss.one_pass(model, group_size="all")  # type: ignore[arg-type]
    fusion = fastcss.fuse(model)
    assert_type(fusion.replaced, dict[str, str])
    fusion.redo()  # type: ignore[attr-defined]
    fastcss.fuse("model")  # type: ignore[arg-type]


def every_op(x: Tensor, index: Tensor) -> None:
    lora = PackedLora.pack([x], [x], [0.5])
    assert_type(lora.ranks, tuple[int, ...])
    assert_type(fastcss.multi_lora(x, x, lora, mode="routed", index=index, impl="cpu"), Tensor)
    ops.multi_lora(x, x, [x])  # type: ignore[arg-type]
    ops.multi_lora(x, x, lora, x, "routed")  # type: ignore[call-arg]
    assert_type(ops.affinity_attention(x, x, x, scale=1.0, mean=True), tuple[Tensor, Tensor])
    assert_type(ops.affinity_loss(x, x, index, ignore_index=255), Tensor)
    assert_type(ops.class_affinity(x, x, x, x), tuple[Tensor, Tensor])
    assert_type(ops.class_centers(x, x), Tensor)
    found = ops.cost_filter(x, ops.pack_text(x), 32)
    assert_type(found.index, Tensor)
    assert_type(ops.scatter_cost(found, 847, fill=-1.0), Tensor)
    ops.scatter_cost(found, 847, -1.0)  # type: ignore[call-arg]
    ops.scatter_cost(x, 847)  # type: ignore[arg-type]
    assert_type(ops.filtered_argmax(found), Tensor)
    assert_type(ops.top_classes(x, 3), tuple[Tensor, Tensor])
    assert_type(ops.phrase_pool(x, x), Tensor)
    assert_type(ops.select_tokens(x, x, threshold=0.3, length=512).counts, Tensor)
    assert_type(ops.prompt_mlp(x, x, x, x, x, index), Tensor)
    ops.merge_masks(x, x, (480, 640, 3))  # type: ignore[arg-type]
    assert_type(ops.topk_queries(x, x, 5).index, Tensor)
    assert_type(ops.top_margin(x, index).curvature, Tensor)
    assert_type(ops.deformable_attention(x, [(4, 5)], x, x, x), Tensor)
    ops.deformable_attention(x, x, x, x, x)  # type: ignore[arg-type]
    assert_type(ops.bi_attention(x, x, x, x).text, Tensor)
    assert_type(ops.window_attention(x, x, x, x, 7, shift=3), Tensor)
    ops.window_attention(x, x, x, x, 7, 3)  # type: ignore[call-arg]
    assert_type(ops.relative_attention(x, x, x, x, x, window=7), Tensor)


def every_head(x: Tensor, labels: Tensor) -> None:
    caa = heads.ClassAwareAffinity(512, num_classes=21)
    assert_type(caa.forward(x).logits, Tensor)
    assert_type(caa.loss(caa.forward(x), labels).total, Tensor)
    caa.loss(x, labels)  # type: ignore[arg-type]
    assert_type(heads.CategoryFilter(32).forward(x, x).cost, Tensor)
    head = heads.LSMSegHead(512)
    assert_type(head.predict(x, x), Tensor)
    assert_type(head.loss(head.filtered(x, x), labels, ignore_index=0), Tensor)


def a_run(folder: Path, picture: Tensor) -> None:
    plan = Plan("voc", "15-5", root="VOCdevkit", recipe=Recipe(epochs=2))
    Plan("voc", "15-5", "naive")  # type: ignore[call-arg]
    Recipe(5)  # type: ignore[call-arg]
    assert_type(plan.tasks, list[tuple[int, ...]])
    continual.begin(folder, plan, ("DINO", "SAM"), settings={"rank": 8})
    assert_type(continual.train(folder, workers=2), dict)
    model = load(folder)
    save_task(model, 0, folder, overwrite=True)
    evaluated = continual_evaluation.evaluate(model, plan.test_data(), plan.labels, 800, 1333, mode="shared")
    assert_type(evaluated, Tensor)
    made = preprocess(picture, shortest=64, longest=96)
    assert_type(made, Picture)
    assert_type(model.segment(picture, picture, [made.size], crops=[made.crop]), Segmentation)
    preprocess(picture, 64)  # type: ignore[call-arg]


def parts_of_a_system(picture: Tensor, folder: Path) -> None:
    assert_type(GroundingDinoEncoder.random("tiny", seed=1), GroundingDinoEncoder)
    detector, segmenter = ClassDetector.from_folder(folder), SamSegmenter.from_folder(folder)
    assert_type(detector, ClassDetector)
    assert_type(detector.forward(picture, picture), DetectedClasses)
    assert_type(segmenter.decode(picture, picture), Masks)
    model = DecoupleCSS(detector, segmenter, rank=8)
    model.add_task(["cat"], Phrases(picture, picture), name="task0")
    model.add_task(["cat"], describe(["cat"]))  # type: ignore[arg-type]
    DecoupleCSS(segmenter, segmenter)  # type: ignore[arg-type]
    DecoupleCSS(detector, detector)  # type: ignore[arg-type]


def data_sets(root: Path) -> None:
    scenes = DigitScenes("train", 100, seed=1)
    assert_type(scenes[0], tuple[Tensor, Tensor])
    assert_type(tasks("digits", "5-1"), list[tuple[int, ...]])
    training_set(VOC(root, "train"), classes=(1, 2))
    ContinualMetrics(tasks("voc", "15-1"), "images")  # type: ignore[arg-type]
