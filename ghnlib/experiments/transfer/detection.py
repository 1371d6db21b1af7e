"""Detection with Faster R-CNN on backbones that a hypernetwork initialises (PPUDA section 5.3, GHN-3 Table 8).

Shapes: images (3, h, w) with values 0 to 1; boxes (n, 4) as left, top, right, bottom in pixels. There is one class, 1.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import NamedNetwork
from ghnlib.data.images import DataError
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.transfer.pretraining import Source
from ghnlib.experiments.transfer.scenes import Scene, Scenes, scenes_of
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.kept import rows_kept
from ghnlib.params import Detection
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    counted,
    paired_interval,
    rate_in_words,
    with_deviation,
)
from ghnlib.training.initialization import Sources
from ghnlib.training.networks import Run, TrainingRecipe, best_settings, initial_network

DECAY_EPOCHS = 3
"""After which the learning rate falls to a tenth (PPUDA)."""
SIDE = ["backbone", "initialisation"]
"""What learning rates are tuned for."""


def feature_layers(net: nn.Module) -> nn.Module:
    """A network's layers before global pooling and classifier: (B, 3, h, w) -> (B, C, h', w'). Raises DataError for
    neither a network of DeepNets (``global_pooling``, ``classifier``) nor a ResNet (``layer4``)."""
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


def faster_rcnn(net: nn.Module, statistics: tuple, settings: Detection) -> nn.Module:
    """Faster R-CNN of torchvision on the single feature map of a classification network (PPUDA); nothing is frozen.
    ``statistics``: mean and deviation of the images that its parameters are made for. Anchors are 32 to 512 pixels
    where images have the paper's 800."""
    from torchvision.models import detection  # here, because it takes a second and few stages need it
    from torchvision.ops import MultiScaleRoIAlign

    size, proposals, backbone = settings.image_size, settings.proposals, feature_layers(net).eval()
    with torch.no_grad():
        backbone.out_channels = backbone(torch.zeros(1, 3, size, size)).shape[1]
    anchors = detection.rpn.AnchorGenerator((tuple(2**k * size / 25 for k in range(5)),), ((0.5, 1.0, 2.0),))
    limits = [f"rpn_{when}_nms_top_n_{mode}" for when in ("pre", "post") for mode in ("train", "test")]
    return detection.FasterRCNN(
        backbone, min_size=size, max_size=size * 5 // 3, image_mean=statistics[0], image_std=statistics[1],
        rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(49 * backbone.out_channels, settings.hidden),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(settings.hidden, 2),
        box_batch_size_per_image=min(512, proposals), **dict.fromkeys(limits, proposals),
    )  # fmt: skip


def train_detector(detector: nn.Module, scenes: Sequence[Scene], settings: Detection, seed: int, lr: float) -> bool:
    """SGD with linear warm-up in the first epoch, a tenth of the rate each three epochs, mirrored images at random.
    Returns whether the loss stayed finite; where it does not, training ends."""
    batch_size = settings.batch_size
    optimizer = torch.optim.SGD(detector.train().parameters(), lr, momentum=0.9, weight_decay=5e-4, fused=True)
    generator, steps = Generator().manual_seed(seed), len(scenes) // batch_size
    for step in range(settings.epochs * steps):
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
    """Average precision in percent at IoU 0.50 as COCO defines it. ``found``: ``boxes``, ``labels`` and ``scores`` of
    each scene."""
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
    backbones: Mapping[str, Architecture | NamedNetwork],
    hypernetworks: Mapping[str, Sequence[GHN]],
    scenes: Scenes,
    statistics: tuple,
    settings: Detection,
    processes: int = 1,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Train detectors on backbones (classification networks by name) with random, orthogonal and predicted parameters,
    in processes of one core each; finished ones' precision is kept in the folder, see ``map_kept``.

    If ``settings.lrs`` leaves a choice, each backbone and initialisation takes the peak learning rate that finds most
    in the last quarter of the training scenes after training on the others, with the first training of a hypernetwork.
    The i-th seed's runs start from what the i-th predicts, or in turn if there are more seeds. ``statistics``: see
    ``faster_rcnn``.

    Returns one row a backbone, initialisation and seed: ``backbone``, ``initialisation``, ``lr``, ``seed``,
    ``training`` (that the seed stands for), ``ap`` (percent; NaN if the loss was not finite or there was an error),
    ``error`` ("" if none): what is wrong with a backbone ends only its own rows.
    """
    starts: dict[str, Sequence[GHN | None]] = {"random": [None], "orthogonal": [None], **hypernetworks}
    sides, lrs, seeds = list(product(backbones, starts)), settings.lrs, settings.seeds
    trainings = dict(zip(seeds, cycle(range(max(map(len, starts.values()))))))

    def precision(runs: Sequence[tuple[str, str, float, int]], scenes: Scenes) -> pd.DataFrame:
        columns, tasks = [*SIDE, "lr", "seed", "training"], []
        for backbone, name, lr, seed in runs:
            ghn = starts[name][trainings[seed] % len(starts[name])]
            labels = dict(zip(columns, (backbone, name, lr, seed, trainings[seed])))
            tasks.append((labels, (backbones[backbone], name, ghn, lr, seed)))
        rows = rows_kept(_precision, tasks, (scenes, statistics, settings), processes, folder)
        return rows.reindex(columns=[*columns, "ap", "error"])

    best = {side: {"lr": lrs[0]} for side in sides}
    if len(lrs) > 1:
        count = len(scenes.train) * 3 // 4
        parts = Scenes(scenes.train[:count], scenes.train[count:])
        tried = precision([(*side, lr, seeds[0]) for side in sides for lr in lrs], parts)
        best = best_settings(tried, SIDE, ["lr"], score="ap")
    return precision([(*side, best[side]["lr"], seed) for side in sides for seed in seeds], scenes)


def _precision(
    network: Architecture | NamedNetwork,
    initialisation: str,
    ghn: GHN | None,
    lr: float,
    seed: int,
    scenes: Scenes,
    statistics: tuple,
    settings: Detection,
) -> dict[str, float]:
    with torch.no_grad():
        sources = Sources(parameters=ghn.predict(network.graph, predict_class_layers=False)) if ghn else Sources()
    run = Run(network, TrainingRecipe(0, lr), seed, "ghn-noise" if ghn else initialisation, sources)
    detector = faster_rcnn(initial_network(run), statistics, settings).to(scenes.device)
    if not train_detector(detector, scenes.train, settings, seed, lr):
        return {"ap": math.nan}
    detector.eval()
    with torch.no_grad():
        return {"ap": average_precision([detector([scene.image])[0] for scene in scenes.test], scenes.test)}


@dataclass(frozen=True)
class Detected:
    """Detectors on backbones from each initialisation. ``rows``: of ``detect_from_each``, for the ``scenes``; ``name``:
    the hypernetwork's variant; ``lrs``: the rates that were tried."""

    rows: pd.DataFrame
    scenes: Scenes
    name: str
    lrs: Sequence[float]

    @cached_property
    def counted(self) -> pd.DataFrame:
        """The rows that statistics are taken of, see ``counted``."""
        return counted(self.rows, "ap")

    @property
    def diverged(self) -> pd.DataFrame:
        """Settings of the runs whose loss was not finite."""
        lost = self.rows["ap"].isna() & (self.rows["error"] == "")
        return self.rows[lost].drop(columns=["training", "ap", "error"])

    @property
    def diverged_by_start(self) -> dict[str, int]:
        """How many of these there are of each initialisation."""
        return {start: int((self.diverged["initialisation"] == start).sum()) for start in self.precision}

    @property
    def failed(self) -> pd.DataFrame:
        """The first error of each backbone that has failed."""
        return self.rows[self.rows["error"] != ""].groupby("backbone", sort=False)[["error"]].first()

    @property
    def precision(self) -> dict[str, float]:
        """Average precision (percent) by initialisation, mean over backbones and seeds."""
        return self.counted.groupby("initialisation", sort=False)["ap"].mean().to_dict()

    @property
    def table(self) -> pd.DataFrame:
        """One row an initialisation: average precision of each backbone, mean ± deviation over seeds (of predictions:
        over trainings), and its rate."""
        sides = self.counted.groupby(SIDE[::-1], sort=False)
        cells = sides["ap"].agg(with_deviation).unstack(sort=False)
        tuned = sides["lr"].first().map(lambda lr: rate_in_words(lr, self.lrs))
        rates = tuned.unstack(sort=False).add_suffix(", learning rate")
        return cells.join(rates).rename_axis(index=None, columns=None)

    @property
    def leads(self) -> dict[str, Measured]:
        """Points by which predictions are ahead, over backbones and trainings, by "A - B"."""
        pairs = self.counted.groupby(["training", *SIDE])["ap"].mean().unstack("initialisation")
        others = [start for start in ("random", "orthogonal") if {start, self.name} <= set(pairs)]
        each = [
            {f"{self.name} - {start}": paired_interval(rows[self.name], rows[start]) for start in others}
            for _, rows in pairs.groupby(level="training")
        ]
        return claims_over_trainings(each) if others else {}

    @property
    def claims(self) -> dict[str, Measured]:
        """Of GHN-3 Table 8, for a GHN-3."""
        return {"detection": self.leads["ghn3 - random"]} if "ghn3 - random" in self.leads else {}


def detect(setup: Setup, source: Source) -> Detected:
    """``detect_from_each`` with the backbones of ``setup.transfer.detection``: test architectures by index, or
    torchvision's ResNets by name. Raises DataError, see ``scenes_of``."""
    settings, images = setup.transfer.detection, source.images
    test, classes = setup.split("test", images=images), len(images.classes)
    backbones = {
        backbone if isinstance(backbone, str) else f"test network {backbone}":
        NamedNetwork(classes, settings.image_size, backbone) if isinstance(backbone, str) else test[backbone]
        for backbone in settings.backbones
    }  # fmt: skip
    scenes = scenes_of(settings, setup.seed).to(setup.device)
    statistics = images.train.mean, images.train.std
    rows = detect_from_each(backbones, {source.name: source.trainings}, scenes, statistics, settings, **setup.kept)
    return Detected(rows, scenes.to("cpu"), source.name, settings.lrs)
