"""Detection with Faster R-CNN on backbones that a hypernetwork initialises (PPUDA section 5.3, GHN-3 Table 8).

Shapes: images (3, h, w) with values 0 to 1; boxes (n, 4) as left, top, right, bottom in pixels. There is one class, 1.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ghnlib.data import load_images
from ghnlib.evaluation import map_kept, one_line
from ghnlib.hypernetwork import GHN
from ghnlib.images import DataError, Images, decode, mix
from ghnlib.initialization import NOISE, add_noise, orthogonalize

CELL = 32  # pixels a side of the part of a scene that holds one digit
DECAY_EPOCHS = 3  # after which the learning rate falls to a tenth (PPUDA)


class Scene(NamedTuple):
    """One image (3, h, w) and the ``boxes`` (n, 4) of what is to be found on it."""

    image: Tensor
    boxes: Tensor

    @property
    def target(self) -> dict[str, Tensor]:
        """As torchvision's detectors expect it."""
        return {"boxes": self.boxes, "labels": torch.ones(len(self.boxes), dtype=torch.int64)}

    def flipped(self) -> Scene:
        """Its mirror image."""
        mirrored = self.boxes.clone()
        mirrored[:, [0, 2]] = self.image.shape[-1] - self.boxes[:, [2, 0]]
        return Scene(self.image.flip(-1), mirrored)


def scenes_of(settings: Mapping, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Training and test scenes of the section ``transfer.detection``: Penn-Fudan's in ``root``, the last of a random
    order for test, or without root scenes of the embedded digits. DataError if there are too few."""
    train, test = settings["train_scenes"], settings["test_scenes"]
    if settings["root"] is None:
        digits, side = load_images("digits", seed=seed), settings["image_size"]
        parts = (digits.train, train), (digits.test, test)
        return tuple([digit_scene(part, side, mix(seed, i)) for i in range(count)] for part, count in parts)
    scenes = penn_fudan(settings["root"])
    if train + test > len(scenes):
        raise DataError(f"transfer.detection: {train} + {test} scenes asked for, {settings['root']} has {len(scenes)}.")
    order = torch.randperm(len(scenes), generator=Generator().manual_seed(seed)).tolist()
    return [scenes[i] for i in order[:train]], [scenes[i] for i in order[-test:]]


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
    """Penn-Fudan's images with boxes around the pedestrians of their masks, in the order of their names.

    Args:
        root: folder with images/NAME.jpg and masks/NAME_mask.png (0: background, 1, 2, ...: pedestrians); DataError if
            there are no such images or one has no mask.
    """
    paths = sorted(Path(root, "images").glob("*.jpg"))
    if not paths:
        raise DataError(f"Penn-Fudan is not in {root}: expected images/NAME.jpg and masks/NAME_mask.png in it.")
    return [_pedestrians(path, Path(root, "masks", f"{path.stem}_mask.png")) for path in paths]


def _pedestrians(path: Path, mask: Path) -> Scene:
    image, people = (torch.from_numpy(np.array(decode(str(file)))).permute(2, 0, 1) for file in (path, mask))
    boxes = [_box_of(people[0] == i) for i in people[0].unique() if i > 0]
    return Scene(image / 255, torch.stack(boxes).float())


def feature_layers(net: nn.Module) -> nn.Module:
    """A network's layers before global pooling and classifier: (B, 3, h, w) -> (B, C, h', w').

    Raises:
        DataError: neither a network of DeepNets (``global_pooling``, ``classifier``) nor a ResNet (``layer4``).
    """
    children = dict(net.named_children())
    if {"global_pooling", "classifier"} <= set(children):
        net.global_pooling, net.classifier = nn.Identity(), nn.Identity()
        return net
    if "layer4" in children:
        names = list(children)[: list(children).index("layer4") + 1]
        return nn.Sequential(OrderedDict((name, children[name]) for name in names))
    raise DataError(
        f"{type(net).__name__} cannot be a backbone: expected layers named global_pooling and classifier (DeepNets) or "
        f"layer4 (ResNets), found {', '.join(children) or 'none'}."
    )


def faster_rcnn(net: nn.Module, statistics: tuple, settings: Mapping) -> nn.Module:
    """Faster R-CNN of torchvision on the single feature map of a classification network (PPUDA); nothing is frozen.

    Args:
        statistics: mean and standard deviation of the images that the network's parameters are made for.
        settings: of ``transfer.detection``; anchors are 32 to 512 pixels where images have the paper's 800.
    """
    from torchvision.models import detection  # here, because it takes a second and few stages need it
    from torchvision.ops import MultiScaleRoIAlign

    size, proposals, backbone = settings["image_size"], settings["proposals"], feature_layers(net).eval()
    with torch.no_grad():
        backbone.out_channels = backbone(torch.zeros(1, 3, size, size)).shape[1]
    anchors = detection.rpn.AnchorGenerator((tuple(2**k * size / 25 for k in range(5)),), ((0.5, 1.0, 2.0),))
    limits = [f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")]
    return detection.FasterRCNN(
        backbone, min_size=size, max_size=size * 5 // 3, image_mean=statistics[0], image_std=statistics[1],
        rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(49 * backbone.out_channels, settings["hidden"]),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(settings["hidden"], 2),
        box_batch_size_per_image=min(512, proposals), **dict.fromkeys(limits, proposals),
    )  # fmt: skip


def train_detector(detector: nn.Module, scenes: Sequence[Scene], settings: Mapping, seed: int, lr: float) -> bool:
    """SGD with linear warm-up in the first epoch, a tenth of the rate each three epochs, mirrored images at random.
    Returns whether the loss stayed finite; where it does not, training ends."""
    batch_size = settings["batch_size"]
    optimizer = torch.optim.SGD(detector.train().parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=True)
    generator, steps = Generator().manual_seed(seed), len(scenes) // batch_size
    for step in range(settings["epochs"] * steps):
        if step % steps == 0:
            order = torch.randperm(len(scenes), generator=generator).tolist()
        rising = min(1.0, 1e-3 + step / max(1, min(1000, steps - 1)))
        optimizer.param_groups[0]["lr"] = lr * rising * 0.1 ** (step // steps // DECAY_EPOCHS)
        batch = [scenes[i] for i in order[step % steps * batch_size :][:batch_size]]
        batch = [s.flipped() if torch.rand((), generator=generator) < 0.5 else s for s in batch]
        loss = sum(detector([s.image for s in batch], [s.target for s in batch]).values())
        if not loss.isfinite():
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return True


def average_precision(found: Sequence[Mapping[str, Tensor]], scenes: Sequence[Scene]) -> float:
    """Average precision in percent at IoU 0.50 as COCO defines it.

    Args:
        found: ``boxes``, ``labels`` and ``scores`` of each scene.
    """
    from pycocotools.coco import COCO  # only this needs it
    from pycocotools.cocoeval import COCOeval

    wanted = [box for i, scene in enumerate(scenes) for box in _coco_boxes(i, scene.target)]
    guessed = [box for i, boxes in enumerate(found) for box in _coco_boxes(i, boxes)]
    truth = COCO()
    truth.dataset = {"images": [{"id": i} for i in range(len(scenes))], "categories": [{"id": 1}]}
    truth.dataset["annotations"] = [{**box, "id": k} for k, box in enumerate(wanted, start=1)]
    with contextlib.redirect_stdout(None):  # it prints its progress
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(guessed) if guessed else COCO(), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    return 100 * float(evaluation.eval["precision"][0, :, 0, 0, -1].mean())


def _coco_boxes(image: int, boxes: Mapping[str, Tensor]) -> list[dict]:
    corners, scores = boxes["boxes"].tolist(), boxes.get("scores", boxes["labels"]).tolist()
    sizes = [[left, top, right - left, bottom - top] for left, top, right, bottom in corners]
    common = {"image_id": image, "category_id": 1, "iscrowd": 0}
    return [{**common, "bbox": box, "area": box[2] * box[3], "score": score} for box, score in zip(sizes, scores)]


def detect_from_each(
    backbones: Mapping[str, Callable[[], nn.Module]],
    hypernetworks: Mapping[str, GHN],
    scenes: tuple[Sequence[Scene], Sequence[Scene]],
    statistics: tuple,
    settings: Mapping,
    processes: int = 1,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Train detectors on backbones with random, orthogonal and predicted parameters, in processes of one core each.

    If ``settings["lrs"]`` leaves a choice, each backbone and initialisation takes the peak learning rate that finds
    most in the last quarter of the training scenes after training on the others.

    Args:
        backbones: by name, what makes the classification network with random parameters.
        scenes: of training and test.
        folder: where finished detectors' precision is kept, see ``map_kept``.

    Returns:
        One row a backbone, initialisation and seed: ``backbone``, ``initialisation``, ``lr``, ``seed``, ``ap``
        (percent; NaN if the loss was not finite or there was an error), ``error`` ("" if none): what is wrong with a
        backbone ends only its own rows.
    """
    sides = {"random": None, "orthogonal": orthogonalize, **hypernetworks}

    def precision(runs: list[tuple], scenes: tuple) -> pd.DataFrame:
        tasks = [(backbones[b], sides[s], lr, seed) for b, s, lr, seed in runs]
        rows = pd.DataFrame(runs, columns=["backbone", "initialisation", "lr", "seed"])
        found = map_kept(_precision, tasks, (scenes, statistics, settings), processes, folder)
        return rows.join(pd.DataFrame(found, columns=["ap", "error"]))

    pairs, (first, *others), (train, _) = list(product(backbones, sides)), settings["lrs"], scenes
    rates = dict.fromkeys(pairs, first)
    if others:
        part, seed = len(train) * 3 // 4, settings["seeds"][0]
        tried = precision([(*pair, lr, seed) for pair in pairs for lr in settings["lrs"]], (train[:part], train[part:]))
        best = tried.fillna({"ap": 0.0}).groupby(["backbone", "initialisation"])["ap"].idxmax()
        rates = tried.loc[best].set_index(["backbone", "initialisation"])["lr"].to_dict()
    return precision([(*pair, rates[pair], seed) for pair in pairs for seed in settings["seeds"]], scenes)


def _precision(
    make: Callable, start, lr: float, seed: int, scenes: tuple, statistics: tuple, settings: Mapping
) -> tuple[float, str]:
    train, test = scenes
    try:
        detector = faster_rcnn(_backbone(make, start, seed), statistics, settings)
        if not train_detector(detector, train, settings, seed, lr):
            return math.nan, ""
        detector.eval()
        with torch.no_grad():
            return average_precision([detector([scene.image])[0] for scene in test], test), ""
    except Exception as error:  # whatever is wrong with one backbone, the others have their rows
        return math.nan, one_line(error)


def _backbone(make: Callable, start, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = make()
    if isinstance(start, GHN):
        start.initialize(net, predict_class_layers=False)
        add_noise(net, NOISE, Generator().manual_seed(seed))
    elif start is not None:
        start(net)
    return net
