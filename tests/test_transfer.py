"""Transfer to other classes and datasets: which images, what is carried over, correlations of filters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ghnlib import DeepNets
from ghnlib.data import load_images
from ghnlib.finetuning import TrainingRecipe, initial_network, initial_runs, run_all
from ghnlib.graph import Graph, Node
from ghnlib.images import DataError
from ghnlib.initialization import orthogonalize
from ghnlib.params import read_yaml, validate
from ghnlib.transfer import class_layers, family_networks, filter_correlations, source_and_targets, starts_from_source
from tests.test_hypernetwork import tiny

IMAGES = load_images("digits")
PARAMS = validate(read_yaml(Path(__file__).parent.parent / "params.yaml")).model_dump(mode="json")
TRANSFER = {**PARAMS["transfer"], "source_classes": 6, "oracle_epochs": 1}


def test_the_target_is_the_other_classes():
    source, targets = source_and_targets(IMAGES, PARAMS["data"], TRANSFER, 0)
    assert source.classes == tuple("012345")
    assert {name: target.classes for name, target in targets.items()} == {"other classes": tuple("6789")}


def test_the_target_is_another_dataset(tmp_path):
    for name in "cat", "dog", "eel":
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    pets = {"source": "folder", "root": str(tmp_path), "image_size": 8}
    all_classes = TRANSFER | {"source_classes": 10, "targets": {"pets": pets}}
    source, targets = source_and_targets(IMAGES, PARAMS["data"], all_classes, 0)
    assert len(source.classes) == 10 and targets["pets"].classes == ("cat", "dog", "eel")
    assert targets["pets"].train.pixels.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize(("count", "said"), [(10, "10 classes, of which at most 9"), (11, "transfer.source_classes = 11")])
def test_too_many_source_classes_are_refused(count, said):
    with pytest.raises(DataError, match=said):
        source_and_targets(IMAGES, PARAMS["data"], TRANSFER | {"source_classes": count}, 0)


def test_what_the_source_teaches_is_carried_over_but_for_the_classes():
    source, targets = source_and_targets(IMAGES, PARAMS["data"], TRANSFER | {"source_epoch": True}, 0)
    networks = list(DeepNets("val", space="small", num_classes=6, size=2))
    settings = TRANSFER | {"source_epoch": True, "batch_size": 128}
    starts = starts_from_source(networks, source.train, {"ghn": tiny(num_classes=6)}, settings, None, 0)
    assert {name: len(found) for name, found in starts.items()} == {
        "random, 1 epoch": 2, "orthogonal, 1 epoch": 2, "ghn, 1 epoch": 2, "trained": 1,
    }  # fmt: skip
    learnt = starts["trained"][0]
    assert not set(class_layers(networks[0].graph)) & set(learnt)
    fitted = [network.adapted(4) for network in networks]
    runs = initial_runs(fitted, TrainingRecipe(1, 0.1), [0], {}, given={"trained": starts["trained"]}, post_processed=["trained"])
    assert [dict(run.labels)["initialisation"] for run in runs] == ["random"] * 2 + ["orthogonal"] * 2 + ["trained", "trained-orth"]
    random, carried, processed = (dict(initial_network(runs[i]).named_parameters()) for i in (0, 4, 5))
    weight = next(name for name, value in learnt.items() if value.ndim == 4)
    assert torch.equal(carried[weight], learnt[weight]) and not torch.equal(carried[weight], random[weight])
    assert not torch.equal(processed[weight], learnt[weight])
    assert all(torch.equal(carried[name], random[name]) for name in class_layers(fitted[0].graph))


def test_what_diverged_on_the_source_is_named_and_does_not_go_on(capsys):
    source, targets = source_and_targets(IMAGES, PARAMS["data"], TRANSFER, 0)
    networks = list(DeepNets("val", space="small", num_classes=6, size=1))
    settings = TRANSFER | {"source_lr": 1e30, "batch_size": 128}
    starts = starts_from_source(networks, source.train, {}, settings, None, 0)
    assert "diverged on the source, counted as 0%: trained, network 0" in capsys.readouterr().out
    target = targets["other classes"]
    runs = initial_runs([networks[0].adapted(4)], TrainingRecipe(1, 0.1), [0], {}, given=starts, post_processed=["trained"])
    results = run_all(runs, target.train.few_shot(2, 0), target.test)
    assert results.groupby("initialisation")["accuracy"].apply(lambda part: part.isna().all()).to_dict() == {
        "random": False, "orthogonal": False, "trained": True, "trained-orth": True,
    }  # fmt: skip


def test_small_networks_of_other_families_are_predicted_and_those_that_fail_are_named():
    ghn, small = tiny(num_classes=6), ["small-resnet", "small-convnext", "small-swin"]
    found, failed = family_networks([*small, "resnet49", "inception_v3"], 6, 16, ghn)
    assert list(found) == small
    assert "resnet49" in failed["resnet49"] and "cannot be traced" in failed["inception_v3"]  # too deep for 16 pixels
    for network in found.values():
        run = initial_runs([network.adapted(4, 16)], TrainingRecipe(1, 0.1), [0], {"ghn": ghn}, class_layers=False)[2]
        net, classes = initial_network(run), class_layers(run.architecture.graph)
        assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
        assert dict(net.named_parameters())[classes[0]].shape[0] == 4 and not set(classes) & set(run.parameters)
        predicted = sum(value.numel() for value in run.parameters.values())
        assert predicted > 0.8 * network.num_params


def test_a_network_without_classifier_is_refused():
    graph = Graph([Node("input"), Node("conv", "stem.weight", (8, 3, 3, 3))], [(0, 1)])
    with pytest.raises(DataError, match="without classification layer.*stem.weight"):
        class_layers(graph)


def test_correlations_of_tiled_and_of_orthogonal_filters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(1, 1, 3), nn.Linear(8, 2))
    first = net[0].weight.data[:1]
    net[0].weight.data = torch.cat([first, -first]).repeat(4, 1, 1, 1)
    found = filter_correlations(net)
    assert list(found.index) == [0, 1] and found[0] == pytest.approx(1)
    a, b = net[1].weight.data.flatten(1)[:2].numpy()
    net[1].weight.data = net[1].weight.data[:2]
    assert filter_correlations(net)[1] == pytest.approx(abs(np.corrcoef(a, b)[0, 1]), abs=1e-5)
    net[0].weight.data += 1e-3 * torch.randn_like(net[0].weight)
    orthogonalize(net)
    assert filter_correlations(net)[0] < 0.5
