"""Sets of labelled images: batches, augmentation.

Shapes: n images, B of a batch, s pixels a side. A set that fits in memory is one resident uint8 tensor (n, 3, s, s),
augmented and normalised in batch; a larger one is read by a DataLoader. Both are iterated in the same way.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

BatchPlan = Iterable[tuple[Tensor, int]]
"""What to load: for each batch the indices of its images and the seed of its augmentation."""


class DataError(Exception):
    """A dataset that is missing, unreadable or too small; the message says what to do."""


@dataclass(frozen=True)
class Augment:
    """Random shift by up to ``shift`` pixels (black padding), horizontal flip, ``cut_out`` of ``cutout`` pixels a side.
    Sets read from files take a random resized crop and colour jitter instead of the shift."""

    shift: int = 0
    flip: bool = False
    cutout: int = 0


@dataclass(frozen=True)
class ImageSet(ABC):
    """Labelled images. ``labels`` (n,) index ``classes``; batches are normalised by ``mean`` and ``std``."""

    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches of one pass, at least one."""
        return max(1, len(self) // batch_size)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in order: images (B, 3, s, s) and labels (B,); the last batch may be smaller."""
        return self._load(((index, 0) for index in torch.arange(len(self)).split(batch_size)), None)

    def stream(
        self, batch_size: int, seed: int, start: int = 0, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches without end, images (B, 3, s, s) and labels (B,), reshuffled at each pass. Batch i depends on
        the seed and i alone, so that a resumed training continues exactly with ``start``."""
        return self._load(endless(len(self), min(batch_size, len(self)), seed, start), augment)

    def subset(self, classes: Sequence[int]) -> Self:
        """The images of some classes (by index), relabelled 0, 1, ... in the order given."""
        new_label = torch.full((len(self.classes),), -1)
        new_label[list(classes)] = torch.arange(len(classes))
        kept = self._take(torch.nonzero(new_label[self.labels.cpu()] >= 0).flatten())
        labels = new_label[kept.labels.cpu()].to(kept.labels.device)
        return replace(kept, labels=labels, classes=tuple(self.classes[i] for i in classes))

    def few_shot(self, per_class: int, seed: int) -> Self:
        """``per_class`` images of each class, drawn by seed. Raises DataError if a class has fewer."""
        labels = self.labels.cpu().numpy()
        fewest = np.bincount(labels, minlength=len(self.classes)).min()
        if fewest < per_class:
            raise DataError(f"{per_class} images per class asked for, but a class has only {fewest}.")
        order = np.random.default_rng(seed).permutation(len(labels))
        chosen = [order[labels[order] == label][:per_class] for label in range(len(self.classes))]
        return self._take(torch.from_numpy(np.sort(np.concatenate(chosen))))

    @property
    @abstractmethod
    def side(self) -> int:
        """Pixels a side of its batches."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of its batches."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same set, its batches on the device."""

    @abstractmethod
    def _take(self, index: Tensor) -> Self: ...

    @abstractmethod
    def _load(self, plan: BatchPlan, augment: Augment | None) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Images(ImageSet):
    """A set resident in memory. ``pixels``: uint8 (n, 3, s, s)."""

    pixels: Tensor

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device | str) -> Self:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def _take(self, index: Tensor) -> Self:
        index = index.to(self.labels.device)
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def _load(self, plan: BatchPlan, augment: Augment | None) -> Iterator[tuple[Tensor, Tensor]]:
        for index, seed in plan:
            index = index.to(self.labels.device, non_blocking=True)
            pixels, generator = self.pixels[index], Generator().manual_seed(seed)
            images = self._normalise(shift_and_flip(pixels, augment, generator) if augment else pixels)
            cut = augment and augment.cutout
            yield cut_out(images, augment.cutout, generator) if cut else images, self.labels[index]

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values).to(pixels.device, non_blocking=True)[:, None, None] for values in (self.mean, self.std)
        )
        # Channels last: convolutions on a processor take a fifth less time.
        return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ImageFiles(ImageSet):
    """A set too large for memory, decoded by DataLoader workers. ``paths``: (n,) of the files; ``image_size``: pixels a
    side."""

    paths: np.ndarray
    image_size: int
    device: torch.device = torch.device("cpu")

    @property
    def side(self) -> int:
        return self.image_size

    def to(self, device: torch.device | str) -> Self:
        return replace(self, device=torch.device(device))

    def _take(self, index: Tensor) -> Self:
        return replace(self, paths=self.paths[index.numpy()], labels=self.labels[index])

    def _load(self, plan: BatchPlan, augment: Augment | None) -> Iterator[tuple[Tensor, Tensor]]:
        # each image has a seed of its own: the number of workers changes nothing
        keys = ([(i, seed + k) for k, i in enumerate(index.tolist())] for index, seed in plan)
        files = _Decoded(self, _file_transform(self, augment))
        workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of torchrun
        pinned = self.device.type != "cpu"
        try:
            for images, labels in DataLoader(files, batch_sampler=keys, num_workers=workers, pin_memory=pinned):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except DataError as error:  # of a worker: the message ends with the own one, below a traceback
            raise DataError(str(error).strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: ")) from None


class _Decoded(Dataset):
    """Decoded images of a set of files; a key is an index and the seed of the image's augmentation."""

    def __init__(self, files: ImageFiles, transform: Callable[[Image.Image], Tensor]):
        self.files, self.transform = files, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(decode(self.files.paths[index])), self.files.labels[index]


def _file_transform(files: ImageFiles, augment: Augment | None) -> Callable[[Image.Image], Tensor]:
    """The papers' ImageNet pipeline: a random crop in training, the central one (7/8 of the side) otherwise."""
    from torchvision import transforms  # here, because it takes more than a second and few stages need it

    if augment:
        steps = [transforms.RandomResizedCrop(files.image_size), transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)]
        steps += [transforms.RandomHorizontalFlip()] if augment.flip else []
    else:
        steps = [transforms.Resize(files.image_size * 8 // 7), transforms.CenterCrop(files.image_size)]
    steps += [transforms.ToTensor(), transforms.Normalize(files.mean, files.std)]
    if augment and augment.cutout:
        steps.append(partial(cut_out, side=augment.cutout))
    return transforms.Compose(steps)


def shift_and_flip(pixels: Tensor, augment: Augment, generator: Generator) -> Tensor:
    """Each image (B, 3, s, s) shifted and flipped at random; what enters at the border is black."""
    n, _, side, _ = pixels.shape
    offset = torch.randint(2 * augment.shift + 1, (2, n, 1), generator=generator)
    rows, columns = offset + torch.arange(side)  # (B, s) each
    if augment.flip:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(pixels, [augment.shift] * 4).permute(0, 2, 3, 1)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    rows, columns = (indices.to(pixels.device, non_blocking=True) for indices in (rows, columns))
    picked = padded[image, rows[:, :, None], columns[:, None, :]]  # (B, s, s, 3)
    return picked.permute(0, 3, 1, 2).contiguous()


def cut_out(images: Tensor, side: int, generator: Generator | None = None) -> Tensor:
    """Normalised images (..., 3, s, s) with a square of ``side`` pixels around a random one set to 0, the mean colour
    (cutout, DeVries and Taylor 2017); what of it lies outside is lost. Without a generator: torch's own."""
    pixels = images.shape[-1]
    centres = torch.randint(pixels, (2, *images.shape[:-3], 1), generator=generator)
    offset = torch.arange(pixels) - centres + side // 2
    rows, columns = (offset >= 0) & (offset < side)  # (..., s) each
    square = rows[..., None, :, None] & columns[..., None, None, :]
    return images.masked_fill(square.to(images.device, non_blocking=True), 0.0)


def endless(n: int, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, int]]:
    """Indices (B,) of batches, reshuffled at each pass, and a seed for each, from batch ``start`` on."""
    per_pass = n // batch_size
    order, order_of = None, -1
    for step in count(start):
        if step // per_pass != order_of:
            order_of = step // per_pass
            order = torch.randperm(n, generator=Generator().manual_seed(mix(seed, 0, order_of)))
        first = step % per_pass * batch_size
        yield order[first : first + batch_size], mix(seed, 1, step)


def mix(*numbers: int) -> int:
    """One well-mixed seed (62 bits) from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(2))


def decode(path: str) -> Image.Image:
    """An image file in RGB. Raises DataError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders of damaged files raise all kinds, and a bomb an own one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not a readable image ({reason}). Delete or replace the file.") from None
