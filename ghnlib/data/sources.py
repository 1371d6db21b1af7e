"""Image classification data: sources and their splits into training, validation and test.

Shapes: n images, s pixels a side.
"""

# torchvision and scikit-learn are imported where they are used: they take seconds, and few stages need them.
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ghnlib.data.images import Augment, DataError, ImageFiles, Images, ImageSet, decode
from ghnlib.params import Data

CIFAR10_STATISTICS = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_VALIDATION = 5_000
"""The papers validate on the last 5,000 training images of the original CIFAR batches."""


@dataclass(frozen=True)
class ImageSplits:
    """Training, validation and test images of one source."""

    train: ImageSet
    val: ImageSet
    test: ImageSet

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.train.classes

    @property
    def device(self) -> torch.device:
        """Of the batches."""
        return self.train.device

    @property
    def side(self) -> int:
        """Pixels a side."""
        return self.val.side

    def to(self, device: torch.device | str) -> Self:
        """The same sets, their batches on the device."""
        return ImageSplits(*(part.to(device) for part in (self.train, self.val, self.test)))

    def subset(self, classes: Sequence[int]) -> Self:
        """All three splits with some of the classes only."""
        return ImageSplits(*(part.subset(classes) for part in (self.train, self.val, self.test)))


def images_of(data: Data, seed: int) -> ImageSplits:
    """Images of the section ``data`` of params.yaml."""
    return load_images(**data.model_dump(exclude={"shift", "flip"}), seed=seed)


def augmentation_of(data: Data) -> Augment:
    """Augmentation of the section ``data``."""
    return Augment(shift=data.shift, flip=data.flip)


def load_images(
    source: str,
    root: str | Path | None = None,
    seed: int = 0,
    image_size: int | None = None,
    val_share: float = 0.2,
    test_share: float = 0.2,
    test_per_class: int | None = None,
    download: bool = False,
    resident_gib: float = 2.0,
) -> ImageSplits:
    """Splits of a source: ``digits`` (embedded), ``cifar10``, ``cifar100``, ``imagenet`` or ``folder``.

    Args:
        root: the dataset's folder. For ``folder``: an ImageFolder tree with train/ and test/ (or val/), or one tree of
            class folders that is split by seed.
        image_size: pixels a side; by default the source's own (digits: 16, imagenet: 224).
        val_share: share of the training images of each class kept for validation, where the source has no val of its
            own. The original CIFAR batches keep the papers' last 5,000 instead.
        test_share: the same for test, of all images of a class.
        test_per_class: of the test images of each class only so many, drawn by seed; None: all.
        seed: of the splits and of what ``test_per_class`` draws.
        download: whether CIFAR may be fetched into the root.
        resident_gib: folders whose images take no more memory, as uint8 at ``image_size``, are read at once and stay in
            it (augmented by shifts); larger ones are decoded image by image (random crops, as the papers' ImageNet).

    Raises:
        DataError: an unknown source, no folder, no or damaged images there, or too few of a class.
    """
    if source not in SOURCES:
        raise DataError(f"data.source: no source named {source!r}; there are {', '.join(SOURCES)}.")
    if source != "digits" and root is None:
        raise DataError(f"data.root: the source {source} needs a folder. {NO_DOWNLOAD}")
    options = {"val": val_share, "test": test_share, "download": download, "resident": resident_gib}
    splits = SOURCES[source](Path(root or "."), seed, image_size, **options)
    return replace(splits, test=splits.test.few_shot(test_per_class, seed)) if test_per_class else splits


NO_DOWNLOAD = "The default profile (make repro without PROFILE) reads embedded digits and needs no download."


def stratified_split(labels: np.ndarray, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Indices of a remainder and of one part per share, each in random order, each with every class. Raises DataError
    if a class has too few images for that."""
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in (*shares, "remainder")]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        sizes = [max(1, round(share * len(members))) for share in shares]
        if sum(sizes) >= len(members):
            raise DataError(f"class {label} has {len(members)} images: too few to appear in every split.")
        for part, chosen in zip(parts, np.split(members, np.cumsum(sizes)), strict=True):
            part.append(chosen)
    held_out, remainder = parts[:-1], parts[-1]
    return [rng.permutation(np.concatenate(part)) for part in (remainder, *held_out)]


def _digits(root: Path, seed: int, size: int | None, val: float, test: float, **rest) -> ImageSplits:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / bunch.images.max())
    grey = F.interpolate(grey, (size or 16,) * 2, mode="bilinear", align_corners=False)
    pixels = grey.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    # val_share is of what test leaves
    parts = stratified_split(bunch.target, (val * (1 - test), test), seed)
    classes = tuple(str(name) for name in bunch.target_names)
    return _resident([(pixels[part], bunch.target[part]) for part in parts], classes)


def _resident(parts: list[tuple[Tensor, np.ndarray]], classes: tuple[str, ...], statistics=None) -> ImageSplits:
    mean, std = statistics or _statistics(parts[0][0])
    return ImageSplits(*(Images(torch.from_numpy(y).long(), classes, mean, std, x) for x, y in parts))


def _statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in 0..1; exact whatever the number of threads."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _cifar(which: str, root: Path, seed: int, size: int | None, download: bool, **rest) -> ImageSplits:
    from torchvision import datasets

    kind = getattr(datasets, which)
    try:
        train, held_out = (kind(root, train=part, download=download) for part in (True, False))
    except RuntimeError:
        raise DataError(
            f"{which} is not in {root}: expected the folder {root / kind.base_folder} (the python "
            f"version of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked). data.download: true fetches it. "
            f"{NO_DOWNLOAD}"
        ) from None
    sets = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), np.array(part.targets)) for part in (train, held_out)]
    if size and size != 32:
        sets = [(_resize(pixels, size), labels) for pixels, labels in sets]
    (x, y), tested = [(pixels.contiguous(), labels) for pixels, labels in sets]
    last = -CIFAR_VALIDATION
    statistics = CIFAR10_STATISTICS if which == "CIFAR10" else None
    return _resident([(x[:last], y[:last]), (x[last:], y[last:]), tested], tuple(train.classes), statistics)


def _resize(pixels: Tensor, size: int) -> Tensor:
    resize = lambda chunk: F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
    return torch.cat([resize(chunk).round().clamp(0, 255).to(torch.uint8) for chunk in pixels.split(999)])


def _imagenet(root: Path, seed: int, size: int | None, **rest) -> ImageSplits:
    missing = [str(root / part) for part in ("train", "val") if not (root / part).is_dir()]
    if missing:
        raise DataError(
            f"ImageNet is not in {root}: expected {' and '.join(missing)}, each with a folder per class. Get the "
            f"ILSVRC2012 archives from https://image-net.org; torchvision.datasets.ImageNet unpacks them. {NO_DOWNLOAD}"
        )
    return _folder(root, seed, size or 224, statistics=IMAGENET_STATISTICS, **rest)


def _folder(
    root: Path, seed: int, size: int | None, val: float, test: float, resident: float, statistics=None, **rest
) -> ImageSplits:
    parts, classes = _folder_files(root, seed, val, test)
    size = size or min(decode(parts[0][0][0]).size)
    if sum(len(paths) for paths, _ in parts) * 3 * size**2 <= resident * 2**30:
        return _resident([(_read(paths, size), labels) for paths, labels in parts], classes, statistics)
    mean, std = statistics or IMAGENET_STATISTICS
    return ImageSplits(*(ImageFiles(torch.from_numpy(y).long(), classes, mean, std, x, size) for x, y in parts))


Files = tuple[np.ndarray, np.ndarray]
"""Paths and labels."""
WRONG = ("valid", "validation")
"""Folders that others name so and here would be classes, or not read."""


def _folder_files(root: Path, seed: int, val: float, test: float) -> tuple[list[Files], tuple[str, ...]]:
    """Files of train, val and test, in random order: batch statistics of files sorted by class would mislead."""
    if not (root / "train").is_dir():
        files, classes = _tree(root)
        if parts := sorted({"test", "val", *WRONG} & {*classes}):
            raise DataError(f"{root} has {', '.join(parts)} but no train: name the folder of training images so.")
        return _split(files, (val * (1 - test), test), seed), classes
    if wrong := [name for name in WRONG if (root / name).is_dir()]:
        raise DataError(f"{root / wrong[0]} would not be read: validation images belong in {root / 'val'}.")
    own = {name: _tree(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
    if len(own) == 1:
        raise DataError(f"{root} has train/ but neither test/ nor val/.")
    classes = own["train"][1]
    for name, (_, found) in own.items():
        if found != classes:
            raise DataError(f"{root / name} and {root / 'train'} differ in classes: {set(found) ^ set(classes)}.")
    train, *kept, (paths, labels) = [files for files, _ in own.values()]
    order = np.random.default_rng(seed).permutation(len(paths))
    parts = [train, *kept] if kept else _split(train, (val,), seed)
    return [*parts, (paths[order], labels[order])], classes


def _split(files: Files, shares: Sequence[float], seed: int) -> list[Files]:
    paths, labels = files
    return [(paths[part], labels[part]) for part in stratified_split(labels, shares, seed)]


def _tree(root: Path) -> tuple[Files, tuple[str, ...]]:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(root))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"no images in {root}: expected a folder per class, each with images ({error}). Point data.root at an "
            f"ImageFolder tree: class folders, or train/ and test/ with class folders in them. {NO_DOWNLOAD}"
        ) from None
    if hidden := [name for name in folder.classes if name.startswith(".")]:
        raise DataError(f"{root / hidden[0]} would be a class of images: remove that folder.")
    paths, labels = zip(*folder.samples, strict=True)
    return (np.array(paths), np.array(labels)), tuple(folder.classes)


def _read(paths: Sequence[str], size: int) -> Tensor:
    """uint8 (n, 3, size, size): each image resized on its shorter side, its centre kept."""
    square = lambda path: np.asarray(ImageOps.fit(decode(path), (size, size), Image.Resampling.BILINEAR))
    with ThreadPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(square, paths)))).permute(0, 3, 1, 2).contiguous()


SOURCES: dict[str, Callable[..., ImageSplits]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, "CIFAR10"),
    "cifar100": partial(_cifar, "CIFAR100"),
    "imagenet": _imagenet,
    "folder": _folder,
}
