"""Makes small scenes with something to learn, and the model and the trainer that learn it."""

from __future__ import annotations

import torch
from decouplecss_models import build
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_training import Recipe, TaskTrainer
from fastcss.models.task_pictures import TaskPictures

LABELS = (4, 2)  # of the task's two classes; 1 and 3 are other tasks'
SIDES = {"shortest": 48, "longest": 96}


class Squares(Dataset):
    """Shows a red square (label 4), a blue one (label 2) or both on grey noise; a grey one (label 1) is another
    task's."""

    def __init__(self, count: int, sizes: tuple[tuple[int, int], ...] = ((48, 64), (64, 48))) -> None:
        self.count, self.sizes = count, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(item)
        height, width = self.sizes[item % len(self.sizes)]
        image = 0.4 + 0.2 * torch.rand(3, height, width, generator=generator)
        labels = torch.zeros(height, width, dtype=torch.int64)
        shown = [(4,), (2,), (4, 2)][item % 3]
        for place, label in enumerate((1, *shown)):
            top = int(torch.randint(0, height - 20, (), generator=generator))
            square = slice(top, top + 18), slice(place * 16, place * 16 + 14)
            labels[square] = label
            color = {1: (0.7, 0.7, 0.7), 2: (0.1, 0.1, 0.9), 4: (0.9, 0.1, 0.1)}[label]
            image[(slice(None), *square)] = torch.tensor(color)[:, None, None]
        return image, labels


def pictures_for(model: DecoupleCSS, count: int = 5, **sizes) -> TaskPictures:
    return TaskPictures(Squares(count, **sizes), LABELS, model.segmenter, **SIDES)


def single_class_trainer(**recipe) -> TaskTrainer:
    """Make a trainer of a task with one class, which each of three pictures shows; 30 steps, each with all three."""
    model = build((1,))
    shown = Subset(Squares(4, sizes=((48, 64),)), [0, 2, 3])
    recipe = Recipe(epochs=30, batch_size=3, learning_rate=3e-3, power=0, weight_decay=0, **recipe)
    return TaskTrainer(model, model.tasks[0], TaskPictures(shown, LABELS[:1], model.segmenter, **SIDES), recipe)


def trainer_for(sizes: tuple[int, ...] = (1, 2), count: int = 5, **recipe) -> TaskTrainer:
    """Make a trainer of a model's last task; the model's adapters are not zero."""
    model = build(sizes)
    recipe = {"epochs": 3, "batch_size": 2, "learning_rate": 1e-3} | recipe
    return TaskTrainer(model, model.tasks[-1], pictures_for(model, count), Recipe(**recipe))
