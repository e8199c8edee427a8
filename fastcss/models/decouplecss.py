"""Defines DecoupleCSS, which detects classes with adapters of their task, and segments them by a class-agnostic SAM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._ops.select_tokens import PRESENCES
from ..ops import SelectedTokens, merge_masks, select_tokens
from .all_tasks import AllTasks
from .class_detector import ClassDetector, DetectedClasses
from .grounding_dino import LORA_SITES
from .prompt_generator import PromptGenerator, pack
from .sam import Masks, SamSegmenter
from .task import Phrases, Task

MODES = ("one_pass", "shared", "literal")
#: A pixel that two masks claim goes to the one with the higher confidence: SAM's estimate of the mask's IoU; or how far
#: r of eq. A.2 is above the class's threshold, as a share of the largest possible: ``(r - θ) / (1 - θ)``.
CONFIDENCES = ("sam", "presence")


class Segmentation(NamedTuple):
    """Holds a labelled batch.

    Attributes:
        labels: int64 ``[H, W]`` for each image: 0 for background, 1 + k for class k of ``model.classes``.
        present: bool ``[B, C]``, says which classes were found.
        presence: ``[B, C]``, r of eq. A.2, says how sure the detector is of each class.
    """

    labels: list[Tensor]
    present: Tensor
    presence: Tensor


class DecoupleCSS(nn.Module):
    """Learns class after class without touching what it learned before, and segments all of them in one pass.

    Each task has a LoRA adapter in the detector, and each class a prompt generator; the rest is frozen. Segmenting an
    image needs every task's adapter: one pass runs them side by side, while the published system runs task after task.

    Args:
        detector: Grounding DINO's encoder.
        segmenter: SAM.
        threshold: τ of eq. 4, above 0; the paper's is 0.3 for VOC and 0.2 for ADE20K.
        length: how many scalars of a class's tokens its prompt generator reads.
        prompts: how many embeddings per class prompt SAM.
        hidden: width of the prompt generators.
        rank, alpha: rank and alpha of the adapters.
        sites: where the adapters sit. "fusion" adapts the projections of the layers where image and text meet, so that
            all tasks share the image encoder; the paper says its models were trained this way (appendix B.2), and six
            tasks take 22.5 MiB with the published shapes, the published 22.18 MB. "swin+fusion" or "convnext+fusion"
            adapt the detector's backbone of that kind as well (section 3.2.2): 41.9 MiB with Swin-T.
        presence: option of ``select_tokens``: "all", r of eq. A.2; or "best", used by the first runs of this project,
            which overlooks a class whose tokens are all nearer to another class.
        confidence: one of ``CONFIDENCES``. The paper's is "sam", which knows nothing of classes: if two tasks claim the
            same object, "presence" asks which of them is surer.
        initial_generator: generator of one class and of the sizes above, with which the generator of every new class
            begins. By default it begins at random, as in the paper.

    Source: DecoupleCSS (seed of the pipeline: sections 3.1 to 3.4).
    """

    def __init__(
        self,
        detector: ClassDetector,
        segmenter: SamSegmenter,
        *,
        threshold: float = 0.3,
        length: int = 512,
        prompts: int = 6,
        hidden: int = 1024,
        rank: int = 32,
        alpha: float = 32,
        sites: str = "fusion",
        presence: str = "all",
        confidence: str = "sam",
        initial_generator: PromptGenerator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"DecoupleCSS: threshold must be above 0 and at most 1, got {threshold}")
        if presence not in PRESENCES:
            raise ValueError(f"DecoupleCSS: presence must be one of {', '.join(PRESENCES)}, got {presence!r}")
        if confidence not in CONFIDENCES:
            raise ValueError(f"DecoupleCSS: confidence must be one of {', '.join(CONFIDENCES)}, got {confidence!r}")
        _check_sites(sites, detector)
        sizes = {"length": length, "prompts": prompts, "hidden": hidden}
        if initial_generator is not None:
            _check_sizes(initial_generator, sizes | {"classes": 1, "prompt_dim": segmenter.prompt_dim})
            initial_generator.requires_grad_(False)
        self.detector: nn.Module = detector.requires_grad_(False)  # becomes PEFT's model of it with the first task
        self.segmenter = segmenter.requires_grad_(False)
        self.initial_generator = initial_generator
        self.tasks = nn.ModuleList()
        self.threshold, self.length, self.presence, self.confidence = threshold, length, presence, confidence
        self.generator_settings = sizes
        self.lora_settings = {"r": rank, "lora_alpha": alpha, "target_modules": LORA_SITES[sites]}
        self._all: AllTasks | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for task in self.tasks for name in task.classes)

    def add_task(self, classes: Sequence[str], phrases: Phrases, *, name: str | None = None) -> Task:
        """Add a task with an adapter that does nothing yet; only the task's parameters are then trainable.

        Args:
            classes: names of the new classes, none of which exists already.
            phrases: their phrases, [c, M, L].
            name: name of the adapter, by default ``task<t>``.
        """
        from peft import LoraConfig, get_peft_model

        name = f"task{len(self.tasks)}" if name is None else name
        self._check_new(name, classes, phrases)
        config = LoraConfig(**self.lora_settings)
        if self.tasks:
            self.detector.add_adapter(name, config)
        else:
            self.detector = get_peft_model(self.detector, config, adapter_name=name)
        self.detector.set_adapter(name)
        self.tasks.requires_grad_(False)
        task = Task(name, classes, phrases, self._new_generator(len(classes)))
        self.tasks.append(task.to(next(self.segmenter.parameters()).device, self.segmenter.dtype))
        self._all = None
        if not self.training:
            self.eval()  # new modules begin in training mode
        return self.tasks[-1]

    @torch.no_grad()
    def segment(
        self,
        pixel_values: Tensor,
        sam_pixel_values: Tensor,
        sizes: Sequence[tuple[int, int]],
        *,
        crops: Sequence[tuple[int, int]] | None = None,
        mode: str = "one_pass",
    ) -> Segmentation:
        """Label every pixel with one of the classes of all tasks, or as background.

        Args:
            pixel_values: ``[B, 3, H, W]`` for the detector, of any dtype: each model converts it to its own.
            sam_pixel_values: ``[B, 3, S, S]`` for SAM, ``S = segmenter.image_size``.
            sizes: (height, width) of each label map.
            crops: (height, width) of the picture within ``sam_pixel_values``, by default all of it.
            mode: "one_pass"; or, for comparison, "shared", which switches adapters and runs the rest once per image, or
                "literal", which runs everything once per task and every prompt by itself, as published. All give the
                same labels.
        """
        self._check_inputs(pixel_values, sam_pixel_values, sizes, crops, mode)
        pixel_values = pixel_values.to(next(self.detector.parameters()).dtype)
        sam_pixel_values = sam_pixel_values.to(self.segmenter.dtype)
        crops = crops and [self.segmenter.mask_crop(crop) for crop in crops]
        if mode == "literal":
            return self._literal(pixel_values, sam_pixel_values, sizes, crops)
        if self._all is None or self._all.is_stale(self.detector):
            self._all = AllTasks(self.detector, self.tasks, self.select)
        found = self._all.detect(pixel_values) if mode == "one_pass" else self._all.detect_in_turn(pixel_values)
        present = _present(found, self._all.thresholds)
        image, index = present.nonzero().unbind(1)  # of each class that an image shows
        counts = present.sum(1).tolist()
        prompts = self._all.generator(found.tokens[image, index], index)
        embeddings = self.segmenter.embed(sam_pixel_values, fused=mode == "one_pass")
        masks = self.segmenter.decode(embeddings, prompts, counts=counts)
        masks = self._rated(masks, found.presence[image, index], self._all.thresholds[index])
        parts = zip(*(part.split(counts) for part in (*masks, index)), strict=True)
        labels = [
            _merge(Masks(logits, scores), classes, size, crops and crops[b])
            for b, (size, (logits, scores, classes)) in enumerate(zip(sizes, parts, strict=True))
        ]
        return Segmentation(labels, present, found.presence)

    def _literal(
        self,
        pixel_values: Tensor,
        sam_pixel_values: Tensor,
        sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]] | None,
    ) -> Segmentation:
        batch = range(len(sizes))
        masks, indices = [[] for _ in batch], [[] for _ in batch]
        presents, presences, first = [], [], 0
        for task in self.tasks:
            self.detector.set_adapter(task.name)
            detector = self.detector.get_base_model()
            phrases = detector.embed_phrases(task.input_ids, task.attention_mask)
            found = self.select(self.detector(pixel_values, phrases=phrases))
            present = _present(found, task.thresholds)
            embeddings = self.segmenter.embed(sam_pixel_values)
            for b in batch:
                for k in present[b].nonzero()[:, 0].split(1):
                    prompt = task.generator(found.tokens[b, k], k)
                    mask = self.segmenter.decode(embeddings[b, None], prompt)
                    masks[b].append(self._rated(mask, found.presence[b, k], task.thresholds[k]))
                    indices[b].append(first + k)
            presents.append(present), presences.append(found.presence)
            first += len(task.classes)
        none = self.segmenter.decode(embeddings[:1], embeddings.new_empty(0, 1, self.segmenter.prompt_dim))
        labels = [
            _merge(
                Masks(*(torch.cat(parts) for parts in zip(none, *masks[b], strict=True))),
                torch.cat([present.new_empty(0, dtype=torch.long), *indices[b]]),
                sizes[b],
                crops and crops[b],
            )
            for b in batch
        ]
        return Segmentation(labels, torch.cat(presents, 1), torch.cat(presences, 1))

    def select(self, detected: DetectedClasses) -> SelectedTokens:
        """Select the tokens of each class, eq. 3 and 4, and measure its presence."""
        sizes = {"threshold": self.threshold, "length": self.length}
        return select_tokens(detected.tokens, detected.classes, **sizes, presence=self.presence)

    def _rated(self, masks: Masks, presence: Tensor, thresholds: Tensor) -> Masks:
        if self.confidence == "sam":
            return masks
        return masks._replace(scores=(presence - thresholds) / (1 - thresholds).clamp(min=1e-6))

    def _new_generator(self, classes: int) -> PromptGenerator:
        if self.initial_generator is not None:
            return pack([self.initial_generator] * classes).requires_grad_(True)
        return PromptGenerator(classes, prompt_dim=self.segmenter.prompt_dim, **self.generator_settings)

    def train(self, mode: bool = True) -> DecoupleCSS:
        self._all = None  # the weights are about to change
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_all": None}  # a copy packs its tasks anew

    def _check_new(self, name: str, classes: Sequence[str], phrases: Phrases) -> None:
        if isinstance(classes, str) or not classes:
            raise ValueError(f"DecoupleCSS.add_task: classes must be a list of at least one name, got {classes!r}")
        for known in classes:
            if known in self.classes or list(classes).count(known) > 1:
                raise ValueError(f"DecoupleCSS.add_task: class {known!r} is there already")
        if name in (task.name for task in self.tasks):
            raise ValueError(f"DecoupleCSS.add_task: task {name!r} is there already")
        if not name or "." in name:  # it becomes part of the adapter's parameter names
            raise ValueError(f"DecoupleCSS.add_task: name must not be empty and have no dot, got {name!r}")
        ids, mask = phrases.input_ids, phrases.attention_mask
        if ids.dim() != 3 or len(ids) != len(classes) or 0 in ids.shape or ids.shape != mask.shape:
            raise ValueError(
                f"DecoupleCSS.add_task: phrases must be [{len(classes)}, M, L] for these classes, ids and mask alike, "
                f"got {list(ids.shape)} and {list(mask.shape)}"
            )
        if self.tasks and ids.shape[1] != self.tasks[0].input_ids.shape[1]:
            wanted = self.tasks[0].input_ids.shape[1]
            raise ValueError(f"DecoupleCSS.add_task: phrases must be {wanted} a class, as before, got {ids.shape[1]}")

    def _check_inputs(self, pixel_values: Tensor, sam_pixel_values: Tensor, sizes, crops, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"DecoupleCSS.segment: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not self.tasks:
            raise RuntimeError("DecoupleCSS.segment: no task was added yet")
        if self.training:
            raise RuntimeError("DecoupleCSS.segment: wants the model in eval mode")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
            raise ValueError(
                f"DecoupleCSS.segment: pixel_values must be [B, 3, H, W] with B ≥ 1, got {list(pixel_values.shape)}"
            )
        wanted = [len(pixel_values), 3, *[self.segmenter.image_size] * 2]
        if list(sam_pixel_values.shape) != wanted:
            raise ValueError(
                f"DecoupleCSS.segment: sam_pixel_values must be {wanted}, got {list(sam_pixel_values.shape)}"
            )
        for name, given in (("sizes", sizes), ("crops", crops)):
            if given is not None and len(given) != len(pixel_values):
                raise ValueError(f"DecoupleCSS.segment: {name} must have one entry an image, got {len(given)}")
        if any(max(crop) > wanted[-1] for crop in crops or ()):
            raise ValueError(f"DecoupleCSS.segment: crops must be within sam_pixel_values, {wanted[2:]}, got {crops}")


def _present(found: SelectedTokens, thresholds: Tensor) -> Tensor:
    """Tell which classes are present, by r alone.

    A class that is best for no token is prompted for by L_k, which its generator has learned of it. r is 0 if no token
    reaches τ, which is above 0; a task that is not calibrated has a threshold of 0.
    """
    return (found.presence > 0) & (found.presence >= thresholds)


def _check_sites(sites: str, detector: ClassDetector) -> None:
    if sites not in LORA_SITES:
        raise ValueError(f"DecoupleCSS: sites must be one of {', '.join(LORA_SITES)}, got {sites!r}")
    places = [name for name, _ in detector.named_modules() if re.fullmatch(LORA_SITES[sites], name)]
    if sites != "fusion" and not any(name.startswith("backbone.") for name in places):
        backbone = type(detector.backbone.conv_encoder.model).__name__
        raise ValueError(f"DecoupleCSS: sites {sites!r} has no place in the detector's backbone, a {backbone}")


def _check_sizes(generator: PromptGenerator, wanted: dict[str, int]) -> None:
    differ = [name for name, size in generator.sizes.items() if size != wanted[name]]
    if differ:
        first, second = (", ".join(f"{name} {of[name]}" for name in differ) for of in (wanted, generator.sizes))
        raise ValueError(f"DecoupleCSS: initial_generator must have {first}, got {second}")


def _merge(masks: Masks, index: Tensor, size: tuple[int, int], crop: tuple[int, int] | None) -> Tensor:
    """Merge the masks of the classes ``index`` into one label map: 1 + class, or 0 where there is no mask."""
    labels = merge_masks(masks.masks, masks.scores, size, crop=crop)
    return torch.cat([index.new_zeros(1), index + 1])[labels]
