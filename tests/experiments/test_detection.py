"""Scenes, backbones and average precision of detection, each against its definition."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from shared import digits, params, pool, tiny
from torch import nn
from torchvision.models import resnet18, vgg11

from ghnlib.architectures.vision import NamedNetwork
from ghnlib.data.images import DataError
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.transfer import detection
from ghnlib.experiments.transfer.pretraining import Source
from ghnlib.experiments.transfer.scenes import Scenes, digit_scene, penn_fudan, scenes_of


def few(**changes):
    """The default profile's settings, for a step of two scenes."""
    small = {"train_scenes": 4, "test_scenes": 2, "epochs": 1, "batch_size": 2}
    return params().transfer.detection.model_copy(update=small | changes)


def statistics():
    return digits().train.mean, digits().train.std


def test_scenes_depend_on_the_seed_alone():
    one, again, other = (scenes_of(few(), seed).train for seed in (1, 1, 2))
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(one, again))
    assert not torch.equal(one[0].image, other[0].image)
    assert len({scene.image.numpy().tobytes() for scene in one}) == 4


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_the_smallest_around_each_digit(flip):
    for seed in range(30):
        scene = digit_scene(digits().train, 96, seed)
        scene = scene.flipped() if flip else scene
        assert 1 <= len(scene.boxes) <= 3 and scene.image.min() >= 0 and scene.image.max() <= 1
        rest = scene.image.clone()
        for left, top, right, bottom in scene.boxes.int().tolist():
            digit = scene.image[0, top:bottom, left:right]
            assert all(float(edge.max()) > 0 for edge in (digit[0], digit[-1], digit[:, 0], digit[:, -1]))
            rest[:, top:bottom, left:right] = 0
        assert not rest.any()


def test_pedestrians_are_read_from_their_masks(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="expected images/NAME.jpg"):
        penn_fudan(tmp_path)
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(DataError, match="a_mask.png"):
        penn_fudan(tmp_path)
    (tmp_path / "masks").mkdir()
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[2:5, 3:9], mask[7:, 15:] = 1, 2
    Image.fromarray(mask).save(tmp_path / "masks" / "a_mask.png")
    (scene,) = penn_fudan(tmp_path)
    assert scene.boxes.tolist() == [[3, 2, 9, 5], [15, 7, 20, 10]] and scene.image.shape == (3, 10, 20)
    with pytest.raises(DataError, match=r"4 \+ 2 scenes asked for, .* has 1"):
        scenes_of(few(root=str(tmp_path)), 0)


def test_average_precision_of_perfect_of_no_and_of_misplaced_boxes():
    scenes = scenes_of(few(), 0).test
    perfect = [scene.target | {"scores": torch.ones(len(scene.boxes))} for scene in scenes]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    beside = [found | {"boxes": found["boxes"] + 100} for found in perfect]
    nearly = [found | {"boxes": found["boxes"] + 1} for found in perfect]
    assert detection.average_precision(perfect, scenes) == detection.average_precision(nearly, scenes) == 100
    assert detection.average_precision([nothing] * 2, scenes) == detection.average_precision(beside, scenes) == 0


@pytest.mark.parametrize("make", [resnet18, lambda: pool()[0].build(device="cpu")])
def test_feature_layers_end_before_global_pooling(make):
    features = detection.feature_layers(make().eval())(torch.zeros(1, 3, 64, 64))
    assert features.ndim == 4 and features.shape[-1] > 1


def test_a_backbone_without_them_is_named_with_what_was_expected():
    with pytest.raises(
        DataError, match=r"VGG .*expected .*global_pooling.*layer4.*found features, avgpool, classifier"
    ):
        detection.feature_layers(vgg11())


def test_two_steps_from_each_initialisation():
    nets, scenes = {"net": pool()[0]}, scenes_of(few(), 0)
    found, again = (
        detection.detect_from_each(nets, {"ghn": [tiny()]}, scenes, statistics(), few(seeds=(0,))) for _ in range(2)
    )
    assert list(found["initialisation"]) == ["random", "orthogonal", "ghn"] and found["ap"].between(0, 100).all()
    assert list(found) == ["backbone", "initialisation", "lr", "seed", "training", "ap", "error"]
    assert found.equals(again)
    assert (found["error"] == "").all()
    diverging = detection.detect_from_each(nets, {}, scenes, statistics(), few(lrs=(1e30,), epochs=3, seeds=(0,)))
    assert diverging["ap"].isna().any() and (diverging["error"] == "").all()


class Plain:
    """An architecture of one layer."""

    def build(self, **options):
        return nn.Sequential(nn.Conv2d(3, 4, 3))


def test_a_backbone_without_feature_layers_ends_only_its_own_rows():
    backbones = {"plain": Plain(), "net": pool()[0]}
    found = detection.detect_from_each(backbones, {}, scenes_of(few(), 0), statistics(), few(lrs=(0.01,), seeds=(0,)))
    broken, others = (found[found["backbone"] == name] for name in backbones)
    assert broken["ap"].isna().all() and broken["error"].str.startswith("DataError: Sequential cannot be a back").all()
    assert others["ap"].between(0, 100).all() and (others["error"] == "").all()
    detected = detection.Detected(found, scenes_of(few(), 0), "ghn3", ())
    assert list(detected.failed.index) == ["plain"] and list(detected.table) == ["net", "net, learning rate"]
    assert detected.claims == {} == detected.leads


def test_where_every_backbone_fails_the_report_says_so():
    found = detection.detect_from_each({"plain": Plain()}, {}, scenes_of(few(), 0), statistics(), few(seeds=(0,)))
    detected = detection.Detected(found, scenes_of(few(), 0), "ghn3", ())
    assert len(found) == 2 and found["ap"].isna().all() and list(detected.failed.index) == ["plain"]
    assert detected.table.empty and detected.precision == detected.leads == detected.claims == {}


def test_each_initialisation_takes_the_rate_that_is_best_on_held_out_training_scenes(monkeypatch):
    called = []

    def precision(network, initialisation, ghn, lr, seed, scenes, *rest):
        called.append((lr, len(scenes.train), len(scenes.test)))
        return {"ap": {0.1: math.nan, 0.2: 50.0 if initialisation == "orthogonal" else 20.0, 0.3: 40.0}[lr]}

    monkeypatch.setattr(detection, "_precision", precision)
    settings = few(lrs=(0.1, 0.2, 0.3), seeds=(0, 1))
    found = detection.detect_from_each({"net": None}, {}, scenes_of(few(), 0), (0, 1), settings)
    assert found.groupby("initialisation")["lr"].first().to_dict() == {"random": 0.3, "orthogonal": 0.2}
    assert [sizes for _, *sizes in called] == [[3, 1]] * 6 + [[4, 2]] * 4


def test_the_runs_of_a_seed_start_from_the_training_of_it(monkeypatch):
    monkeypatch.setattr(detection, "_precision", lambda network, name, ghn, *rest: {"ap": ghn.of if ghn else 0.0})
    trainings = [SimpleNamespace(of=10.0), SimpleNamespace(of=20.0)]
    found = detection.detect_from_each(
        {"net": None}, {"ghn3": trainings}, scenes_of(few(), 0), (0, 1), few(seeds=(4, 5, 6))
    )
    predicted = found[found["initialisation"] == "ghn3"]
    assert predicted["training"].tolist() == [0, 1, 0] and predicted["ap"].tolist() == [10.0, 20.0, 10.0]
    lead = detection.Detected(found, Scenes([], []), "ghn3", (0.1, 0.3)).claims["detection"]
    assert (lead.value, lead.trainings) == (15.0, 2) and lead.high - 15 == pytest.approx(stats.t.ppf(0.975, 1) * 5)


def test_backbones_are_test_architectures_by_index_and_networks_of_torchvision_by_name(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        detection, "detect_from_each", lambda backbones, *rest, **kept: given.update(backbones, rest=rest)
    )
    own = params("tiny")
    transfer = own.transfer.model_copy(update={"detection": few(backbones=(1, "resnet18"))})
    setup = Setup("transfer", "tiny", 0, tmp_path, data=own.data, deepnets=own.deepnets, transfer=transfer)
    images = digits().subset(range(6))
    detected = detection.detect(setup, Source(images, {}, "ghn3", [tiny(num_classes=6)], [50.0]))
    assert given["test network 1"] == setup.split("test", images=images)[1] and given["test network 1"].num_classes == 6
    assert given["resnet18"] == NamedNetwork(6, 64, "resnet18")
    assert given["rest"][2] == (images.train.mean, images.train.std) and len(detected.scenes.test) == 2


def test_what_diverged_counts_as_nothing_found():
    columns = ["backbone", "initialisation", "lr", "seed", "ap", "error"]  # seed i is of training i
    rows = [("net", "random", 0.1, 0, 20.0, ""), ("net", "random", 0.1, 1, math.nan, ""), ("net", "orthogonal", 0.1, 0, 30.0, ""),
            ("net", "orthogonal", 0.1, 1, 10.0, ""), ("net", "ghn3", 0.3, 0, 50.0, ""), ("net", "ghn3", 0.3, 1, 44.0, "")]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    detected = detection.Detected(table.assign(training=table["seed"]), Scenes([], []), "ghn3", (0.1, 0.3))
    assert detected.precision == {"random": 10.0, "orthogonal": 20.0, "ghn3": 47.0}
    assert detected.claims["detection"].value == 37 == detected.leads["ghn3 - random"].value
    assert detected.claims["detection"].trainings == 2 and detected.leads["ghn3 - random"].n == 1
    assert detected.diverged.to_dict("records") == [
        {"backbone": "net", "initialisation": "random", "lr": 0.1, "seed": 1}
    ]
    assert detected.table.loc["ghn3"].to_list() == ["47.0 ± 4.2", "0.3 (end of grid)"]
    assert detected.diverged_by_start == {"random": 1, "orthogonal": 0, "ghn3": 0}
