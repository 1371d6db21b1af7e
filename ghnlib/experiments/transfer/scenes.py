"""Scenes for detection: digits composed on black, or Penn-Fudan's photographs of pedestrians.

Shapes: images (3, h, w) with values 0 to 1; boxes (n, 4) as left, top, right, bottom in pixels. There is one class, 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ghnlib.data.images import DataError, Images, decode, mix
from ghnlib.data.sources import load_images
from ghnlib.params import Detection

CELL = 32
"""Pixels a side of the part of a scene that holds one digit."""


class Scene(NamedTuple):
    """One image (3, h, w) and the ``boxes`` (n, 4) of what is to be found on it."""

    image: Tensor
    boxes: Tensor

    @property
    def target(self) -> dict[str, Tensor]:
        """As torchvision's detectors expect it."""
        return {"boxes": self.boxes, "labels": torch.ones(len(self.boxes), dtype=torch.int64, device=self.boxes.device)}

    def flipped(self) -> Self:
        """Its mirror image."""
        mirrored = self.boxes.clone()
        mirrored[:, [0, 2]] = self.image.shape[-1] - self.boxes[:, [2, 0]]
        return Scene(self.image.flip(-1), mirrored)


class Scenes(NamedTuple):
    """Those that detectors are trained and tested on."""

    train: Sequence[Scene]
    test: Sequence[Scene]

    @property
    def device(self) -> torch.device:
        """Of all of them."""
        return self.train[0].image.device

    def to(self, device: torch.device) -> Self:
        """The same scenes on the device."""
        return Scenes(*([Scene(s.image.to(device), s.boxes.to(device)) for s in part] for part in self))


def scenes_of(settings: Detection, seed: int) -> Scenes:
    """Penn-Fudan's scenes in ``settings.root``, the last of a random order for test, or without root scenes of the
    embedded digits. Raises DataError if there are too few."""
    train, test = settings.train_scenes, settings.test_scenes
    if settings.root is None:
        digits, side = load_images("digits", seed=seed), settings.image_size
        parts = (digits.train, train), (digits.test, test)
        return Scenes(*([digit_scene(part, side, mix(seed, i)) for i in range(count)] for part, count in parts))
    scenes = penn_fudan(settings.root)
    if train + test > len(scenes):
        raise DataError(f"transfer.detection: {train} + {test} scenes asked for, {settings.root} has {len(scenes)}.")
    order = torch.randperm(len(scenes), generator=Generator().manual_seed(seed)).tolist()
    return Scenes([scenes[i] for i in order[:train]], [scenes[i] for i in order[-test:]])


def digit_scene(digits: Images, side: int, seed: int) -> Scene:
    """1 to 3 digits of 16 to 28 pixels on black, no two in the same cell of 32x32 pixels; ``side``: at least 64."""
    rng = np.random.default_rng(seed)
    image, boxes, across = torch.zeros(3, side, side), [], side // CELL
    for cell in rng.permutation(across**2)[: rng.integers(1, 4)]:
        pixels = digits.pixels[int(rng.integers(len(digits)))][None].float() / 255
        size = int(rng.integers(16, 29))
        digit = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)[0]
        top, left = (CELL * np.array(divmod(cell, across)) + rng.integers(0, CELL - size + 1, 2)).tolist()
        image[:, top : top + size, left : left + size] = digit
        boxes.append(_box_of(digit[0] > 0) + torch.tensor([left, top, left, top]))
    return Scene(image, torch.stack(boxes).float())


def _box_of(mask: Tensor) -> Tensor:
    """The smallest box around a mask (h, w); its right and bottom edges are those of the last pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def penn_fudan(root: str | Path) -> list[Scene]:
    """Penn-Fudan's images with boxes around the pedestrians of their masks, in the order of their names: in a folder
    with images/NAME.jpg and masks/NAME_mask.png (0: background, 1, 2, ...: pedestrians). Raises DataError if there are
    no such images or one has no mask."""
    paths = sorted(Path(root, "images").glob("*.jpg"))
    if not paths:
        raise DataError(f"Penn-Fudan is not in {root}: expected images/NAME.jpg and masks/NAME_mask.png in it.")
    return [_pedestrians(path, Path(root, "masks", f"{path.stem}_mask.png")) for path in paths]


def _pedestrians(path: Path, mask: Path) -> Scene:
    image, people = (torch.from_numpy(np.array(decode(str(file)))).permute(2, 0, 1) for file in (path, mask))
    boxes = [_box_of(people[0] == i) for i in people[0].unique() if i > 0]
    return Scene(image / 255, torch.stack(boxes).float())
