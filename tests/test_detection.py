"""Scenes, backbones and average precision of detection, each against its definition."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18, vgg11

from ghnlib import DeepNets, detection
from ghnlib.data import load_images
from ghnlib.detection import average_precision, detect_from_each, digit_scene, feature_layers, penn_fudan, scenes_of
from ghnlib.images import DataError
from ghnlib.params import read_yaml, validate
from tests.test_hypernetwork import tiny

DIGITS = load_images("digits").train
SETTINGS = validate(read_yaml(Path(__file__).parent.parent / "params.yaml")).model_dump(mode="json")["transfer"]["detection"]
FEW = SETTINGS | {"train_scenes": 4, "test_scenes": 2, "epochs": 1, "batch_size": 2}


def test_scenes_depend_on_the_seed_alone():
    one, again, other = (scenes_of(FEW, seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(one, again))
    assert not torch.equal(one[0].image, other[0].image)
    assert len({scene.image.numpy().tobytes() for scene in one}) == 4


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_the_smallest_around_each_digit(flip):
    for seed in range(30):
        scene = digit_scene(DIGITS, 96, seed)
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
        scenes_of(FEW | {"root": str(tmp_path)}, 0)


def test_average_precision_of_perfect_of_no_and_of_misplaced_boxes():
    scenes = scenes_of(FEW, 0)[1]
    perfect = [scene.target | {"scores": torch.ones(len(scene.boxes))} for scene in scenes]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    beside = [found | {"boxes": found["boxes"] + 100} for found in perfect]
    nearly = [found | {"boxes": found["boxes"] + 1} for found in perfect]
    assert average_precision(perfect, scenes) == average_precision(nearly, scenes) == 100
    assert average_precision([nothing] * 2, scenes) == average_precision(beside, scenes) == 0


@pytest.mark.parametrize("make", [resnet18, lambda: DeepNets("val", space="small")[0].build(device="cpu")])
def test_feature_layers_end_before_global_pooling(make):
    features = feature_layers(make().eval())(torch.zeros(1, 3, 64, 64))
    assert features.ndim == 4 and features.shape[-1] > 1


def test_a_backbone_without_them_is_named_with_what_was_expected():
    with pytest.raises(DataError, match=r"VGG .*expected .*global_pooling.*layer4.*found features, avgpool, classifier"):
        feature_layers(vgg11())


def test_two_steps_from_each_initialisation():
    make = lambda: DeepNets("val", space="small")[0].build(device="cpu", track_running_stats=True)
    statistics = DIGITS.mean, DIGITS.std
    found, again = (detect_from_each({"net": make}, {"ghn": tiny()}, scenes_of(FEW, 0), statistics, FEW) for _ in range(2))
    assert list(found["initialisation"]) == ["random", "orthogonal", "ghn"] and found["ap"].between(0, 100).all()
    assert found.equals(again)
    assert (found["error"] == "").all()
    diverging = detect_from_each({"net": make}, {}, scenes_of(FEW, 0), statistics, FEW | {"lrs": [1e30], "epochs": 3})
    assert diverging["ap"].isna().any() and (diverging["error"] == "").all()


def test_a_backbone_without_feature_layers_ends_only_its_own_rows():
    class Plain(nn.Sequential):
        pass

    make = lambda: DeepNets("val", space="small")[0].build(device="cpu", track_running_stats=True)
    backbones = {"plain": lambda: Plain(nn.Conv2d(3, 4, 3)), "net": make}
    found = detect_from_each(backbones, {}, scenes_of(FEW, 0), (DIGITS.mean, DIGITS.std), FEW | {"lrs": [0.01]})
    broken, others = (found[found["backbone"] == name] for name in backbones)
    assert broken["ap"].isna().all() and broken["error"].str.startswith("DataError: Plain cannot be a backbone").all()
    assert others["ap"].between(0, 100).all() and (others["error"] == "").all()


def test_each_initialisation_takes_the_rate_that_is_best_on_held_out_training_scenes(monkeypatch):
    called = []

    def precision(make, start, lr, seed, scenes, *rest):
        called.append((lr, len(scenes[0]), len(scenes[1])))
        return {0.1: math.nan, 0.2: 50.0 if start else 20.0, 0.3: 40.0}[lr], ""

    monkeypatch.setattr(detection, "_precision", precision)
    settings = FEW | {"lrs": [0.1, 0.2, 0.3], "seeds": [0, 1]}
    found = detect_from_each({"net": None}, {}, scenes_of(FEW, 0), (0, 1), settings)
    assert found.groupby("initialisation")["lr"].first().to_dict() == {"random": 0.3, "orthogonal": 0.2}
    assert [sizes for _, *sizes in called] == [[3, 1]] * 6 + [[4, 2]] * 4
