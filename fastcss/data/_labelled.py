"""Reads data sets of picture files that each have a label map of the same size."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from .._files import whole_file
from ._pictures import read_image, read_labels, read_size


class LabelledPictures(Dataset):
    """Reads pictures and their label maps item by item; finds the labels in each once, and keeps them.

    Args:
        images: file of each picture.
        masks: file of each label map.
        classes: the largest label.
        cache: folder that keeps which labels the images show; None is fastcss in the user's cache folder.

    Each item is ``(image, labels)``: float32 ``[3, H, W]`` in 0…1, and int64 ``[H, W]`` of 0…classes, or 255 on pixels
    that do not count. ValueError names a file that is no picture, has a label outside the set, or is not of its
    picture's size.
    """

    def __init__(
        self, images: Sequence[Path], masks: Sequence[Path], classes: int, cache: str | Path | None = None
    ) -> None:
        self.images, self.masks, self._classes = images, masks, classes
        self._cache = _user_cache() if cache is None else Path(cache)
        self._shown: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        image, labels = read_image(self.images[item]), read_labels(self.masks[item], self._classes)
        if image.shape[1:] != labels.shape:
            raise self._sizes_differ(item, labels)
        return image, labels

    def shown(self) -> list[tuple[int, ...]]:
        """Return for each item the labels that occur in it, except background and 255.

        The first call reads every label map and the size of every picture, and keeps the answer in the cache folder
        until a file changes its name, size or time of change. If the folder cannot be written, it warns and goes on.
        """
        if self._shown is None:
            kept = self._cache / f"shown-{_digest(str(mask.absolute()) for mask in self.masks)}.json"
            stamp = _digest(
                f"{stat.st_size} {stat.st_mtime_ns}" for stat in map(Path.stat, (*self.masks, *self.images))
            )
            self._shown = _read_kept(kept, stamp, len(self))
            if self._shown is None:
                with ThreadPoolExecutor() as pool:
                    self._shown = list(pool.map(self._labels_in, range(len(self))))
                _keep(kept, {"stamp": stamp, "shown": self._shown})
        return self._shown

    def _labels_in(self, item: int) -> tuple[int, ...]:
        labels = read_labels(self.masks[item], self._classes)
        if read_size(self.images[item])[0] != labels.shape:  # found here, the fault cannot stop a run half-way
            raise self._sizes_differ(item, labels)
        counts = labels.flatten().bincount(minlength=256)
        return tuple(counts[1:255].nonzero().add_(1).flatten().tolist())

    def _sizes_differ(self, item: int, labels: Tensor) -> ValueError:
        size, turned = read_size(self.images[item])
        return ValueError(
            f"{self.masks[item]} has {_size(labels.shape)} pixels, and its picture {self.images[item]} has "
            f"{_size(size)}{', turned as its EXIF orientation says' if turned else ''}"
        )


def pair(
    name: str, stems: Sequence[str], images: tuple[Path, str], masks: tuple[Path, str]
) -> tuple[list[Path], list[Path]]:
    """Return the files of the pictures and label maps with these names.

    Args:
        name: name of the data set, for errors.
        stems: name of each item.
        images: folder of the pictures and their suffix.
        masks: folder of the label maps and their suffix.

    Raises:
        FileNotFoundError: some files are missing; the message names the first.
    """
    files = []
    for folder, suffix in (images, masks):
        there = set(os.listdir(folder))
        missing = [stem for stem in stems if stem + suffix not in there]
        if missing:
            raise FileNotFoundError(
                f"{name}: {len(missing)} of {len(stems)} files are missing from {folder}, the first is "
                f"{missing[0]}{suffix}"
            )
        files.append([folder / (stem + suffix) for stem in stems])
    return files[0], files[1]


def _size(size: Sequence[int]) -> str:
    return "×".join(map(str, reversed(size)))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastcss"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\n")
    return digest.hexdigest()[:32]


def _read_kept(path: Path, stamp: str, count: int) -> list[tuple[int, ...]] | None:
    """Return what ``_keep`` wrote, or None if there is no file, one with another stamp, or one that cannot be read."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["stamp"] == stamp and len(kept["shown"]) == count:
            return [tuple(labels) for labels in kept["shown"]]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def _keep(path: Path, content: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            json.dump(content, file)
    except OSError as error:
        warnings.warn(f"what the images show is not kept for next time: {error}", stacklevel=3)
