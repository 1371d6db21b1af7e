"""Properties of networks and their prediction, each against its definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared import digits, params, pool, tiny

from ghnlib.data.images import mix
from ghnlib.data.sources import ImageSplits
from ghnlib.experiments.analysis import properties
from ghnlib.experiments.analysis.diagnostics import first_weight
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Node
from ghnlib.measuring.accuracy import top_accuracies
from ghnlib.params import Regression
from ghnlib.training.networks import Run, initial_network, train_network

GRID = Regression(C=(1.0, 10.0), gamma=("scale",), epsilon=(0.1,))
FITTED = np.arange(60) < 30


def images():
    return digits(seed=0, image_size=16)


@pytest.mark.parametrize("count", [36, 1000])
def test_networks_of_the_ground_truth_have_batch_norm_while_their_split_has_such(count):
    changed = params().analysis.model_copy(update={"property_networks": count})
    setup = Setup("analysis", "digits", 0, folder=None, data=params().data, deepnets=params().deepnets,
                  analysis=changed)  # fmt: skip
    vars(setup)["images"] = digits(image_size=16)
    found = properties.property_networks(setup)
    for split, half in (("val", found[: count // 2]), ("test", found[count // 2 :])):
        normed = [architecture for architecture in pool(split, 500, input_size=16) if architecture.norm]
        assert len(half) == count // 2 and half[: len(normed)] == normed[: count // 2]


def test_networks_are_measured_once_and_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    tiny = params("tiny")
    changes = {"property_steps": 2, "checkpoints": (1,), "networks": 1, "seconds": True}
    few = ImageSplits(*(part.few_shot(4, seed=0) for part in (images().train, images().val, images().test)))
    analysis, measured, train = tiny.analysis.model_copy(update=changes), [], properties.train_network
    monkeypatch.setattr(properties, "train_network", lambda *rest: measured.append(rest) or train(*rest))

    def found(count, seed=0):
        setup = Setup("analysis", "tiny", seed, folder=tmp_path, data=tiny.data, analysis=analysis)
        return properties.train_and_measure(setup, pool(size=count, input_size=16), few)

    first, trained = found(2).table, found(3)
    assert len(measured) == 3 and trained.table[:2].equals(first)
    found(1, seed=1)
    assert len(measured) == 4  # another seed is another network
    expected = {*properties.PROPERTIES, "test accuracy", "parameters", "path", "accuracy, 1 steps", "index"}
    assert expected == set(trained.table) and (trained.table["seconds"] > 0).all() and trained.sound.all()
    assert len(trained.before) == len(trained.after) == 1
    assert not torch.equal(first_weight(trained.before[0]), first_weight(trained.after[0]))


def test_convergence_is_of_accuracy_on_training_images(tmp_path):
    """Labels of validation images that are all one more than the true ones leave it as it was."""
    small = params("tiny")
    few = ImageSplits(*(part.few_shot(8, seed=0) for part in (images().train, images().val, images().test)))
    wrong = replace(few.val, labels=(few.val.labels + 1) % 10)
    changes = {"property_steps": 40, "checkpoints": (20,), "converged": 30.0}
    sgd = small.analysis.sgd.model_copy(update={"lr": 0.05})
    analysis = small.analysis.model_copy(update={**changes, "sgd": sgd})
    setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=small.data, analysis=analysis)
    found = [properties.train_and_measure(setup, pool(size=1, input_size=16), splits).table.loc[0]
             for splits in (few, ImageSplits(few.train, wrong, few.test))]  # fmt: skip
    assert found[0]["convergence"] == found[1]["convergence"] < 40
    assert found[0]["accuracy"] > found[1]["accuracy"]


def test_accuracies_of_the_ground_truth_are_top5_where_asked_for(tmp_path):
    small = params("tiny")
    few = ImageSplits(*(part.few_shot(8, seed=0) for part in (images().train, images().val, images().test)))
    found = {}
    for score in ("accuracy", "top5"):
        changes = {"property_steps": 4, "checkpoints": (1,), "converged": 60.0, "score": score}
        analysis = small.analysis.model_copy(update=changes)
        setup = Setup("analysis", "tiny", 0, folder=tmp_path, data=small.data, analysis=analysis)
        found[score] = properties.train_and_measure(setup, pool(size=1, input_size=16), few)
    run = Run(pool(size=1, input_size=16)[0], found["top5"].recipe, mix(0, 0))
    net = initial_network(run)
    train_network(net, few.train, run.recipe, run.seed, lambda net: None, (0, 1, 2))
    expected = [top_accuracies(net, part, 256)[name] for name in ("accuracy", "top5") for part in (few.val, few.test)]
    tables = [found[score].table.loc[0] for score in ("accuracy", "top5")]
    assert [table[key] for table in tables for key in ("accuracy", "test accuracy")] == expected
    assert tables[1]["convergence"] < tables[0]["convergence"] == 4, "chance is 50% of top-5"


def test_a_property_that_all_networks_share_is_left_out():
    table = properties.pd.DataFrame({"accuracy": [1.0, 1.0], "FLOPs": [2.0, 3.0], "convergence": [5.0, 5.0]})
    trained = properties.Trained([], table, [], [], None)
    assert trained.measured == ["accuracy", "FLOPs", "convergence"] and trained.properties == ["accuracy", "FLOPs"]


def test_noise_is_the_same_at_each_pass_and_stays_within_the_images():
    noisy = properties.NoisyImages(images().val, 0.3, seed=0)
    one, again = ([x for x, _ in noisy.batches(64)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    mean, std = (torch.tensor(values)[:, None, None] for values in (images().val.mean, images().val.std))
    pixels = torch.cat(one) * std + mean
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    clean = torch.cat([x for x, _ in images().val.batches(64)]) * std + mean
    inner = (clean > 0.4) & (clean < 0.6)  # where hardly anything is clipped
    assert (pixels - clean)[inner].std() == pytest.approx(0.3, rel=0.15)
    (exact, labels), *_ = properties.NoisyImages(images().val, 0.0, seed=0).batches(64)
    torch.testing.assert_close(exact, next(images().val.batches(64))[0], atol=1e-5, rtol=0)
    assert torch.equal(labels, images().val.labels[:64])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({0: 10.0, 10: 30.0, 20: 70.0}, 15.0),
        ({0: 10.0, 20: 40.0}, 20.0),
        ({0: 10.0, 10: 60.0, 20: 40.0}, 8.0),
        ({0: 10.0, 10: math.nan, 20: math.nan}, 20.0),
    ],
)
def test_steps_to_an_accuracy(curve, expected):
    assert properties.steps_to(curve, 50.0) == pytest.approx(expected)


def test_a_property_that_follows_the_features_is_predicted_and_noise_is_not():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4))
    found = properties.predict_property(features, features @ [1.0, 2.0, 0.5, 0.0], FITTED, GRID)
    assert 0.5 < found.tau.low < found.tau.value < found.tau.high and found.tau.n == 30
    assert list(found.metrics.values()) == [30, found.tau.value, found.deviation, found.tau.low, found.tau.high]
    unrelated = properties.predict_property(rng.normal(size=(60, 4)), features[:, 0], FITTED, GRID)
    assert unrelated.tau.low < 0
    assert properties.predict_property(np.zeros((60, 1)), features[:, 0], FITTED, GRID).tau.value == 0


def test_networks_of_the_test_are_not_learnt_from():
    """Their property turned round turns the rank correlation round, whatever the regression has chosen."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.normal(size=60)
    turned = np.where(FITTED, y, -y)
    found = [properties.predict_property(x, of, FITTED, GRID).tau.value for of in (y, turned)]
    assert found[0] == pytest.approx(-found[1])
    graphs = [architecture.graph for architecture in pool(size=20, input_size=16)]
    first, second = (properties.predict_from_graphs(graphs, of[20:40], FITTED[20:40]) for of in (y, turned))
    assert first.tau.value == pytest.approx(-second.tau.value) and first.tau.n == 10


def test_graphs_embedded_together_are_embedded_as_alone():
    ghn, graphs = tiny("gated_gnn"), [architecture.graph for architecture in pool(size=6, input_size=16)]
    with torch.no_grad():
        alone = np.concatenate([ghn.embed(graph).numpy() for graph in graphs])
    np.testing.assert_allclose(properties.embed(ghn, graphs), alone, atol=1e-5)


def test_each_training_predicts_and_baselines_are_computed_once():
    architectures, rng = pool(size=12, input_size=16), np.random.default_rng(0)
    accuracy = np.arange(12.0)
    table = properties.pd.DataFrame({"accuracy": accuracy, "FLOPs": accuracy + 1, "parameters": accuracy[::-1] + 1})
    analysis = params("tiny").analysis.model_copy(update={"property_networks": 12})
    setup = Setup("analysis", "tiny", 0, folder=None, analysis=analysis)
    trained = properties.Trained(architectures, table, [], [], None)
    found = properties.predict_properties(setup, trained, [{"ghn2": rng.normal(size=(12, 4))} for _ in range(3)])
    assert found[0]["parameters"] is found[2]["parameters"] and found[0]["ghn2"] != found[1]["ghn2"]
    taus = [each["ghn2"]["accuracy"].tau.value for each in found]
    shown = properties.table_of_properties(found, ["ghn2"])
    assert shown.loc["ghn2", "accuracy"] == f"{np.mean(taus):.2f} ± {np.std(taus, ddof=1):.2f}"
    claim = properties.claims_of_properties(found, trained._replace(table=measured(table)))["property-accuracy"]
    assert claim.value == pytest.approx(np.mean(taus)) and claim.trainings == 3


def measured(table):
    path = np.linspace(2, 4, len(table))
    return table.assign(path=path, **{"test accuracy": 90 - (path - 3) ** 2, "noisy accuracy": table["accuracy"]})


def test_a_sweet_spot_is_where_a_parabola_is_lowest():
    path = properties.pd.Series(np.linspace(2, 6, 20))
    noise = np.random.default_rng(0).normal(size=20) / 100
    spot = properties.sweet_spot(path, 5 + 3 * (path - 3.5) ** 2 + noise)
    assert spot.lowest == pytest.approx(3.5, abs=0.01) and spot.curvature.n == 20
    assert spot.curvature.value == pytest.approx(3 * path.var(ddof=0), rel=0.01) and spot.curvature.low > 0
    straight = properties.sweet_spot(path, path + 100 * noise).curvature
    assert straight.low < 0 < straight.high
    assert properties.sweet_spot(path[:4], path[:4]) is None and properties.sweet_spot(path * 0, path) is None


def chain(*ops):
    return Graph([Node(op) for op in ops], [(i, i + 1) for i in range(len(ops) - 1)])


def test_the_neural_predictor_averages_neighbours_within_each_graph():
    torch.manual_seed(0)
    net = properties.NeuralPredictor(hidden=4, layers=1).eval()
    joined = properties._joined([chain("input", "conv", "bn"), chain("input", "sum")])
    along, against, pooling, nodes = (matrix.to_dense() for matrix in joined)
    means = [[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0.5, 0.5]]
    torch.testing.assert_close(along, torch.tensor(means))
    torch.testing.assert_close(against, (along.T > 0) / (along.T > 0).sum(1, keepdim=True))
    ways = F.relu(net.forwards[0](along @ nodes)) + F.relu(net.backwards[0](against @ nodes))
    torch.testing.assert_close(net(joined), net.head(net.norm(pooling @ ways / 2)).squeeze(1))
    torch.testing.assert_close(net(joined)[1:], net(properties._joined([chain("input", "sum")])))


def test_a_property_of_real_graphs_is_predicted_and_noise_is_not():
    graphs = [architecture.graph for architecture in pool(size=60, input_size=16)]
    found = properties.predict_from_graphs(graphs, np.log10([len(graph) for graph in graphs]), FITTED)
    assert found.tau.low > 0.3 and found.tau.n == 30
    assert properties.predict_from_graphs(graphs, np.random.default_rng(0).normal(size=60), FITTED).tau.low < 0.1
