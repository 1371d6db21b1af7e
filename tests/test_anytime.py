"""Anytime networks, the hypernetwork that is told of scales and exits, and curves of accuracy over FLOPs."""

import math
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from ghnlib import GHN, DeepNets
from ghnlib.anytime import MSDNet, area_under, exit_accuracies, exit_flops, msdnet_of_flops, trained_curves
from ghnlib.config import PRESETS, GHNConfig, Recipe
from ghnlib.data import load_images
from ghnlib.evaluation import flops
from ghnlib.finetuning import TrainingRecipe
from ghnlib.graph import Graph, Role
from ghnlib.params import read_yaml, validate
from ghnlib.spaces2018 import AnytimeSpace
from ghnlib.training import MetaTrainer
from tests.test_hypernetwork import tiny

SPACE = AnytimeSpace(nodes=((4, 4), (3, 3), (2, 2)), exits=2, width=4)
ARCH = DeepNets("val", space=SPACE, input_size=16)[0]
NET = ARCH.build(device="cpu").eval()
IMAGES = load_images("digits", image_size=16)
x, y = next(IMAGES.train.batches(8))


@pytest.mark.parametrize("build", [ARCH.build, partial(MSDNet, 2, 3, 4, 3, 10)])
def test_an_exit_costs_what_leads_to_it_and_says_the_same_alone(build):
    torch.manual_seed(0)
    net = build(device="cpu").eval()
    everything = net(x)
    assert [logits.shape for logits in everything] == [(8, 10)] * 3
    for k in (1, 2):
        torch.testing.assert_close(net(x, exits=k), everything[:k])
    counted, image = build(device="meta", track_running_stats=True).eval(), torch.empty(1, 3, 16, 16, device="meta")
    assert exit_flops(build, 16) == [flops(lambda k=k: counted(image, exits=k)) for k in (1, 2, 3)]


def test_a_bottleneck_on_concatenated_inputs_is_a_sum_of_one_for_each():
    place = next(i for i, sources in enumerate(NET.sources) if len(sources) > 1)
    sources, node = NET.sources[place], NET.nodes[place]
    shrink, sides = NET.shrinks[place + 1], [16 // NET.shrinks[i] for i in range(len(NET.shrinks))]
    maps = [torch.randn(2, NET._channels([i]), sides[i], sides[i]) for i in range(place + 1)]
    at_scale = [F.adaptive_avg_pool2d(maps[i], 16 // shrink) if NET.shrinks[i] < shrink
                else F.interpolate(maps[i], size=16 // shrink) for i in sources]  # fmt: skip
    weight = torch.cat([bottleneck.weight for bottleneck in node["bottlenecks"]], 1)
    expected = node["rest"](F.conv2d(torch.cat(at_scale, 1), weight))
    torch.testing.assert_close(NET._next(maps), expected, rtol=1e-4, atol=1e-5)


def test_nodes_know_the_scale_of_their_map_and_whether_an_exit_reads_it():
    for node in ARCH.graph.nodes:
        if node.name.startswith("nodes."):
            place = int(node.name.split(".")[1]) + 1
            assert node.shrink == NET.shrinks[place] and node.exit == ([place] in NET.exits)
    named = [node for node in ARCH.graph.nodes if node.name]
    assert {node.shrink for node in named} == {1, 2, 4} and {node.exit for node in named} == {True, False}
    bottlenecks = [node.name for node in ARCH.graph.nodes if node.role == Role.BOTTLENECK]
    assert bottlenecks == [name for name, _ in NET.named_parameters() if ".bottlenecks." in name]


def changed(ghn, feature):
    """Which parameters are predicted otherwise if a feature of the last node is another."""
    nodes = list(ARCH.graph.nodes)
    last = max(i for i, node in enumerate(nodes) if node.name.startswith("nodes."))
    nodes[last] = nodes[last]._replace(**{feature: not nodes[last].exit if feature == "exit" else 8})
    with torch.no_grad():
        before, after = ghn.predict(ARCH.graph), ghn.predict(Graph(nodes, ARCH.graph.edges))
    return [name for name, value in before.items() if not torch.allclose(value, after[name])]


@pytest.mark.parametrize("feature", ["shrink", "exit"])
def test_the_hypernetwork_is_told_of_scales_and_exits_if_it_is_an_anytime_one(feature):
    assert changed(tiny("gated_gnn", anytime=True), feature)
    assert not changed(tiny("gated_gnn"), feature)


def test_bottlenecks_are_decoded_from_the_states_at_both_ends_of_their_edge():
    ghn = tiny("gated_gnn", anytime=True)
    graph = ARCH.graph
    plain = tiny("gated_gnn", anytime=True)
    plain.edge = None
    with torch.no_grad():
        states, before = ghn.encode([graph, graph]), plain.encode([graph, graph])
        for i, node in enumerate([*graph.nodes, *graph.nodes]):
            expected = before[i]
            if node.role == Role.BOTTLENECK:
                first = i // len(graph) * len(graph)
                (source,) = graph.edges[graph.edges[:, 1] == i - first, 0]
                (target,) = graph.edges[graph.edges[:, 0] == i - first, 1]
                expected = ghn.edge(torch.cat([before[first + source], before[first + target]]))
            torch.testing.assert_close(states[i], expected)


def test_an_architecture_travels_without_its_graph():
    architecture = DeepNets("test", space="anytime")[0]
    assert architecture.graph is architecture.graph
    arrived = pickle.loads(pickle.dumps(architecture))
    assert arrived == architecture and "graph" in vars(architecture) and "graph" not in vars(arrived)


def test_training_takes_the_gradient_of_the_sum_of_the_losses_of_all_exits():
    recipe = Recipe(meta_batch=1, dropout=False, clip=1e9, lr=1e-12)
    trainer, joint = (MetaTrainer(tiny("gated_gnn", anytime=True), recipe, 1) for _ in range(2))
    row = trainer.step([ARCH], x, y, seed=0)
    logits = torch.func.functional_call(ARCH.build().eval(), joint.ghn.predict(ARCH.graph), (x,))
    loss = sum(F.cross_entropy(exit, y) for exit in logits)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item()) and len(logits) == 3
    for (name, ours), (_, expected) in zip(trainer.ghn.named_parameters(), joint.ghn.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_vanilla_variant_is_the_hypernetwork_of_2018_and_learns():
    params = validate(read_yaml(Path(__file__).parent.parent / "params.yaml"))
    preset = GHNConfig(**PRESETS["ghn"])
    assert replace(GHNConfig(**params.anytime.variant("vanilla")["ghn"]), max_shape=preset.max_shape) == preset
    torch.manual_seed(0)
    trainer = MetaTrainer(GHN(replace(preset, max_shape=(8, 8, 3, 3))), Recipe(meta_batch=1, dropout=False, warmup=0), 1)
    losses = [trainer.step([ARCH], x, y, seed=0)["loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_exits_are_scored_one_by_one():
    scored = exit_accuracies(NET, IMAGES.val, batch_size=50)
    correct = torch.zeros(3)
    for images, labels in IMAGES.val.batches(50):
        correct += torch.tensor([(logits.argmax(1) == labels).sum() for logits in NET(images)])
    assert scored == pytest.approx((100 * correct / len(IMAGES.val)).tolist())


def test_networks_learn_at_every_exit_and_a_diverged_one_has_no_accuracy():
    builds = [partial(MSDNet, 4, 2, 2, 2, 10)] * 2
    recipe = TrainingRecipe(60, 0.05)
    first, second = trained_curves(builds, IMAGES, recipe, 0)
    assert first["accuracy"].min() > 20 and not first.equals(second), "chance is 10%; seeds differ"
    assert first.equals(trained_curves(builds[:1], IMAGES, recipe, 0)[0])
    (failed,) = trained_curves(builds[:1], IMAGES, TrainingRecipe(3, math.inf), 0)
    assert failed["accuracy"].isna().all() and failed["FLOPs"].tolist() == first["FLOPs"].tolist()


@pytest.mark.parametrize("growth", [3, 12])
def test_a_multi_scale_densenet_of_given_flops_is_the_nearest(growth):
    target = exit_flops(partial(MSDNet, growth, 3, 3, 2, 10), 16)[-1]
    assert msdnet_of_flops(target, 3, 3, 2, 10, 16).args[0] == growth


def test_the_area_under_a_curve_is_a_mean_accuracy_over_budgets():
    curve = pd.DataFrame({"FLOPs": [20, 40], "accuracy": [50.0, 90.0]})
    expected = (20 * 10 + 20 * 70 + 60 * 90) / 100
    assert area_under(curve, 0, 100, before=10.0) == pytest.approx(expected, abs=0.1)
    assert area_under(curve, 20, 40, before=0.0) == pytest.approx(70)
