"""Trains one task of DecoupleCSS by a ``Recipe``: its adapter and its prompt generators, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..ops import SelectedTokens
from .class_detector import DetectedClasses
from .decouplecss import DecoupleCSS
from .decouplecss_loss import asymmetric_loss, mask_loss, presence_probability, token_loss
from .phrase_features import phrase_features
from .task import Task
from .task_pictures import Batch, TaskPictures, collate, token_shares


class Losses(NamedTuple):
    """Holds the losses of masks (eq. A.1), presence (eq. A.3) and tokens, the last with its weight; each is ``[]``."""

    masks: Tensor
    presence: Tensor
    tokens: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Says how a task is learnt. The defaults are the paper's for VOC; for ADE20K it has 20 epochs.

    Attributes:
        epochs, batch_size: numbers of epochs and of pictures per step; the last batch of an epoch may be smaller.
        learning_rate: rate at the first step; the later ones have ``(1 - step/steps) ** power`` of it.
        power: exponent of that decay; the paper gives none, this is the field's usual one since DeepLab.
        weight_decay: weight decay of AdamW, for every parameter.
        clip: largest norm of the gradient; None allows any.
        token_weight: weight of ``token_loss`` in tasks of several classes; the paper has no such loss, 0 omits it.
        one_class_token_weight: weight of ``token_loss`` in tasks of a single class. All their pictures show the class,
            so the paper's loss on r never says where it is not; the paper does not say how it copes.
        asymmetric_clip: ``clip`` of ``asymmetric_loss``; eq. A.3 has none.
        seed: seed of the order of the pictures.
    """

    epochs: int = 5
    batch_size: int = 24
    learning_rate: float = 1e-4
    power: float = 0.9
    weight_decay: float = 0.05
    clip: float | None = None
    token_weight: float = 0.0
    one_class_token_weight: float = 1.0
    asymmetric_clip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least_of = {"epochs": 1, "batch_size": 1, "token_weight": 0, "one_class_token_weight": 0}
        for name, least in least_of.items():
            if not getattr(self, name) >= least:  # this form also refuses NaN
                raise ValueError(f"Recipe: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.asymmetric_clip < 1:
            raise ValueError(f"Recipe: asymmetric_clip must be from 0 to below 1, got {self.asymmetric_clip}")

    def token_weight_of(self, classes: int) -> float:
        """Return the weight of ``token_loss`` in a task of so many classes."""
        return self.one_class_token_weight if classes == 1 else self.token_weight


def activate(model: DecoupleCSS, task: Task) -> dict[str, nn.Parameter]:
    """Make the task's parameters the only ones that learn, and its adapter the one that runs; return them by name."""
    model.detector.set_adapter(task.name)
    model.tasks.requires_grad_(False)
    task.requires_grad_(True)
    adapter = {f"detector.{name}": p for name, p in model.detector.named_parameters() if p.requires_grad}
    return adapter | {f"generator.{name}": p for name, p in task.generator.named_parameters()}


def embed_phrases(model: DecoupleCSS, task: Task) -> Tensor:
    """Embed the phrases of a task's classes, ``[c, M, D]``: the text encoder is frozen and runs once per task."""
    return phrase_features(model.detector.get_base_model(), [task])[0]


def training_step(
    model: DecoupleCSS,
    task: Task,
    phrases: Tensor,
    batch: Batch,
    token_weight: float = 0.0,
    asymmetric_clip: float = 0.0,
) -> Losses:
    """Compute the losses of a batch, after ``activate`` was called for the task.

    SAM is prompted for the classes that the labels show, found or not, so that a generator also learns from classes
    that the detector overlooks.
    """
    found, detected = detect(model, phrases, batch.pixel_values)
    with torch.no_grad():
        embeddings = model.segmenter.embed(batch.sam_pixel_values)
    rows = torch.tensor([b for b, count in enumerate(batch.masks_of) for _ in range(count)], dtype=torch.long)
    tokens = found.tokens[rows.to(batch.index.device), batch.index]
    logits = model.segmenter.decode(embeddings, task.generator(tokens, batch.index), counts=batch.masks_of).masks
    largest = torch.stack([_largest_cosine(of) for of in detected])
    probability = presence_probability(found, largest, model.threshold)
    on_tokens = largest.new_zeros(())
    if token_weight:
        cosine = torch.cat([_cosine(of.tokens, of.classes) for of in detected])
        shares = token_shares(batch, [of.shapes.tolist() for of in detected])
        on_tokens = token_weight * token_loss(cosine, shares, model.threshold)
    on_presence = asymmetric_loss(probability, batch.present, clip=asymmetric_clip)
    return Losses(mask_loss(logits, batch.masks), on_presence, on_tokens)


class TaskTrainer:
    """Trains a model's newest task, or any other, epoch by epoch.

    Frozen modules run in eval mode, without dropout, as they do when the model is used. So only the pictures' order is
    random. Time and memory of a step do not depend on how many tasks the model has.

    Args:
        model: the model; it is left in eval mode.
        task: one of ``model.tasks``.
        pictures: the pictures that the task learns from.
        recipe: epochs, batches and rates.
        workers: how many processes read pictures; 0 reads them in this one.

    Attributes:
        epoch: number of finished epochs.

    Source: DecoupleCSS sections 3.4 and 4.1, appendix B.2.

    Example:
        >>> trainer = TaskTrainer(model, task, TaskPictures(dataset, labels, model.segmenter))
        >>> while trainer.epoch < trainer.recipe.epochs:
        ...     print(trainer.run_epoch())
        >>> calibrate(model, task, trainer.pictures)  # from decouplecss_calibration
    """

    def __init__(
        self,
        model: DecoupleCSS,
        task: Task,
        pictures: TaskPictures,
        recipe: Recipe | None = None,
        workers: int = 0,
    ) -> None:
        if len(pictures.labels) != len(task.classes):
            raise ValueError(
                f"TaskTrainer: pictures must have a label for each class of the task, {len(task.classes)}, got "
                f"{len(pictures.labels)}"
            )
        self.model, self.task, self.pictures, self.workers = model.eval(), task, pictures, workers
        self.recipe = Recipe() if recipe is None else recipe
        self.epoch = 0
        self._steps = -(-len(pictures) // self.recipe.batch_size)  # per epoch
        self._parameters = activate(model, task)
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=self.recipe.weight_decay)
        self._order = torch.Generator().manual_seed(self.recipe.seed)
        self._phrases = embed_phrases(model, task)

    def run_epoch(self, report: Callable[[Losses], None] | None = None) -> Losses:
        """Run one epoch, give ``report`` the losses batch by batch, and return their means.

        Raises:
            RuntimeError: all epochs are finished.
            FloatingPointError: a loss was not finite; the weights are then useless.
        """
        if self.epoch >= self.recipe.epochs:
            raise RuntimeError(f"TaskTrainer: all {self.recipe.epochs} epochs are finished")
        self.model.eval()
        activate(self.model, self.task)
        order = torch.randperm(len(self.pictures), generator=self._order).split(self.recipe.batch_size)
        total = self._phrases.new_zeros(len(Losses._fields))
        for i, batch in enumerate(load_batches(self.pictures, order, self.workers)):
            losses = self._step(self.epoch * self._steps + i, batch.to(self._phrases.device))
            total += torch.stack(losses)
            if report is not None:
                report(losses)
        self.model.eval()  # drops what was packed of the model, which has the old weights
        mean = Losses(*(total / self._steps))
        if not total.isfinite().all():
            raise FloatingPointError(f"TaskTrainer: the losses of epoch {self.epoch} are not finite: {mean}")
        self.epoch += 1
        return mean

    def _step(self, step: int, batch: Batch) -> Losses:
        left = 1 - step / (self.recipe.epochs * self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * left**self.recipe.power
        token_weight = self.recipe.token_weight_of(len(self.task.classes))
        clip = self.recipe.asymmetric_clip
        losses = training_step(self.model, self.task, self._phrases, batch, token_weight, clip)
        self._optimizer.zero_grad()
        sum(losses).backward()
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters.values(), self.recipe.clip)
        self._optimizer.step()
        return Losses(*(loss.detach() for loss in losses))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all that later epochs depend on, beside the weights, as tensors; call it between epochs."""
        state = {"epoch": torch.tensor(self.epoch), "order": self._order.get_state()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken; the model must have the weights of that moment.

        Raises:
            ValueError: the state is from another task, recipe or data set; the trainer is left as it was.
        """
        epoch = int(state["epoch"])
        moments = self._moments(state)
        steps = {int(moments[p]["step"]) if p in moments else 0 for p in self._parameters.values()}
        if epoch > self.recipe.epochs or steps != {epoch * self._steps}:
            raise ValueError(
                f"TaskTrainer: state must be of up to {self.recipe.epochs} epochs, each {self._steps} steps of every "
                f"parameter, got {epoch} with {min(steps)} to {max(steps)} steps in all"
            )
        self._order.set_state(state["order"].cpu())
        self._optimizer.state.clear()
        self._optimizer.state.update(moments)
        self.epoch = epoch

    def _moments(self, state: dict[str, Tensor]) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Return AdamW's state for each parameter."""
        moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        for full_name, value in state.items():
            if full_name in ("epoch", "order"):
                continue
            name, _, key = full_name.rpartition("/")
            parameter = self._parameters.get(name)
            if parameter is None or (key != "step" and value.shape != parameter.shape):
                wanted = "no parameter of that name" if parameter is None else list(parameter.shape)
                raise ValueError(f"TaskTrainer: state has {full_name} {list(value.shape)}, the task {wanted}")
            kept = value.clone() if key == "step" else value.to(parameter, copy=True)
            moments.setdefault(parameter, {})[key] = kept
        return moments


def detect(
    model: DecoupleCSS, phrases: Tensor, pictures: Sequence[Tensor]
) -> tuple[SelectedTokens, list[DetectedClasses]]:
    """Run the active adapter on B pictures; return the tokens of each class, and all tokens ``[N, D]`` per picture.

    Pictures of the same size run together. Padding would make tokens, which could be selected.
    """
    groups: dict[torch.Size, list[int]] = {}
    for b, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(b)
    selected, detected = [], []
    for members in groups.values():
        of = model.detector(torch.stack([pictures[b] for b in members]), phrases=phrases)
        selected.append(model.select(of))
        detected += [DetectedClasses(*each, of.shapes) for each in zip(of.tokens, of.classes, strict=True)]
    order = torch.tensor([b for members in groups.values() for b in members]).argsort()
    found = SelectedTokens(*(torch.cat(part)[order.to(phrases.device)] for part in zip(*selected, strict=True)))
    return found, [detected[place] for place in order.tolist()]


def _largest_cosine(of: DetectedClasses) -> Tensor:
    """Return each class's largest cosine with any token, [c]; the search builds no graph, so nothing [N, c] is kept."""
    with torch.no_grad():
        best = _cosine(of.tokens, of.classes).argmax(0)
    return F.cosine_similarity(of.tokens[best], of.classes, dim=-1)


def _cosine(tokens: Tensor, classes: Tensor) -> Tensor:
    """Return the cosines of tokens [N, D] with classes [c, D] → [N, c]."""
    return F.normalize(tokens, dim=-1) @ F.normalize(classes, dim=-1).mT


def load_batches(pictures: TaskPictures, batches: Sequence[Tensor], workers: int) -> DataLoader:
    # The loader gets its own generator, since it draws a seed for its workers, which would move the global one.
    generator = torch.Generator()
    return DataLoader(
        pictures,
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=collate,
        num_workers=workers,
        generator=generator,
    )
