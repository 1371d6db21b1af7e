"""The report on GHN 2018: anytime networks, the hypernetwork that is told of scales and exits, ranking of blocks, curves
of accuracy over FLOPs."""

import math
import pickle
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from shared import ROOT, digits, params, tiny

from ghnlib import GHN, DeepNets
from ghnlib.config import PRESETS, Recipe
from ghnlib.data.images import mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.ghn2018 import AnytimeSpace
from ghnlib.experiments import anytime
from ghnlib.experiments.anytime import CHOSEN, RANDOM, Candidates, Comparison, Ranking, area_under
from ghnlib.experiments.msdnet import MSDNetArchitecture, exit_flops
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Role
from ghnlib.measuring.accuracy import exit_accuracies
from ghnlib.measuring.costs import flops
from ghnlib.params import Anytime
from ghnlib.params_file import read_merged, validate
from ghnlib.reporting.statistics import mean_interval, rank_correlations
from ghnlib.training.networks import TrainingRecipe, train_network
from ghnlib.training.step import MetaTrainer


@cache
def arch():
    space = AnytimeSpace(nodes=((4, 4), (3, 3), (2, 2)), exits=2, width=4)
    return DeepNets("val", space=space, input_size=16)[0]


@cache
def net():
    return arch().build(device="cpu").eval()


@cache
def batch():
    return next(digits(image_size=16).train.batches(8))


@pytest.mark.parametrize("network", ["anytime", "msdnet"])
def test_an_exit_costs_what_leads_to_it_and_says_the_same_alone(network):
    architecture = {"anytime": arch(), "msdnet": MSDNetArchitecture(2, 3, 4, 3, 10, 16)}[network]
    torch.manual_seed(0)
    built, (x, _) = architecture.build(device="cpu").eval(), batch()
    everything = built(x)
    assert [logits.shape for logits in everything] == [(8, 10)] * 3
    for k in (1, 2):
        torch.testing.assert_close(built(x, exits=k), everything[:k])
    counted, image = architecture.build(track_running_stats=True).eval(), torch.empty(1, 3, 16, 16, device="meta")
    assert exit_flops(architecture) == [flops(lambda k=k: counted(image, exits=k)) for k in (1, 2, 3)]


def test_a_bottleneck_on_concatenated_inputs_is_a_sum_of_one_for_each():
    place = next(i for i, sources in enumerate(net().sources) if len(sources) > 1)
    sources, node = net().sources[place], net().nodes[place]
    shrink, sides = net().shrinks[place + 1], [16 // net().shrinks[i] for i in range(len(net().shrinks))]
    maps = [torch.randn(2, net()._channels([i]), sides[i], sides[i]) for i in range(place + 1)]
    at_scale = [F.adaptive_avg_pool2d(maps[i], 16 // shrink) if net().shrinks[i] < shrink
                else F.interpolate(maps[i], size=16 // shrink) for i in sources]  # fmt: skip
    weight = torch.cat([bottleneck.weight for bottleneck in node["bottlenecks"]], 1)
    expected = node["rest"](F.conv2d(torch.cat(at_scale, 1), weight))
    torch.testing.assert_close(net()._next(maps), expected, rtol=1e-4, atol=1e-5)


def test_nodes_know_the_scale_of_their_map_and_whether_an_exit_reads_it():
    for node in arch().graph.nodes:
        if node.name.startswith("nodes."):
            place = int(node.name.split(".")[1]) + 1
            assert node.shrink == net().shrinks[place] and node.exit == ([place] in net().exits)
    named = [node for node in arch().graph.nodes if node.name]
    assert {node.shrink for node in named} == {1, 2, 4} and {node.exit for node in named} == {True, False}
    bottlenecks = [node.name for node in arch().graph.nodes if node.role == Role.BOTTLENECK]
    assert bottlenecks == [name for name, _ in net().named_parameters() if ".bottlenecks." in name]


def changed(ghn, feature):
    """Which parameters are predicted otherwise if a feature of the last node is another."""
    nodes = list(arch().graph.nodes)
    last = max(i for i, node in enumerate(nodes) if node.name.startswith("nodes."))
    nodes[last] = nodes[last]._replace(**{feature: not nodes[last].exit if feature == "exit" else 8})
    with torch.no_grad():
        before, after = ghn.predict(arch().graph), ghn.predict(Graph(nodes, arch().graph.edges))
    return [name for name, value in before.items() if not torch.allclose(value, after[name])]


@pytest.mark.parametrize("feature", ["shrink", "exit"])
def test_the_hypernetwork_is_told_of_scales_and_exits_if_it_is_an_anytime_one(feature):
    assert changed(tiny("gated_gnn", anytime=True), feature)
    assert not changed(tiny("gated_gnn"), feature)


def test_bottlenecks_are_decoded_from_the_states_at_both_ends_of_their_edge():
    ghn = tiny("gated_gnn", anytime=True)
    graph = arch().graph
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
    x, y = batch()
    row = trainer.step([arch()], x, y, seed=0)
    logits = torch.func.functional_call(arch().build().eval(), joint.ghn.predict(arch().graph), (x,))
    loss = sum(F.cross_entropy(exit, y) for exit in logits)
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item()) and len(logits) == 3
    for (name, ours), (_, expected) in zip(trainer.ghn.named_parameters(), joint.ghn.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_vanilla_variant_is_the_hypernetwork_of_2018_and_learns():
    preset = {**PRESETS["ghn"], "num_classes": 10}
    config = params().anytime.config("vanilla")
    assert {key: getattr(config, key) for key in preset.keys() - {"max_shape"}} == {
        key: preset[key] for key in preset.keys() - {"max_shape"}
    }
    torch.manual_seed(0)
    trainer = MetaTrainer(GHN({**preset, "max_shape": (8, 8, 3, 3)}), Recipe(meta_batch=1, dropout=False, warmup=0), 1)
    losses = [trainer.step([arch()], *batch(), seed=0)["loss"] for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_exits_are_scored_one_by_one():
    scored = exit_accuracies(net(), digits(image_size=16).val, batch_size=50)
    correct = torch.zeros(3)
    for images, labels in digits(image_size=16).val.batches(50):
        correct += torch.tensor([(logits.argmax(1) == labels).sum() for logits in net()(images)])
    assert scored == pytest.approx((100 * correct / len(digits(image_size=16).val)).tolist())


@pytest.mark.parametrize("growth", [3, 12])
def test_a_multi_scale_densenet_of_given_flops_is_the_nearest(growth):
    target = exit_flops(MSDNetArchitecture(growth, 3, 3, 2, 10, 16))[-1]
    assert MSDNetArchitecture.of_flops(target, 3, 3, 2, 10, 16).growth == growth


def test_the_area_under_a_curve_is_a_mean_accuracy_over_budgets():
    curve = pd.DataFrame({"FLOPs": [20, 40], "accuracy": [50.0, 90.0]})
    expected = (20 * 10 + 20 * 70 + 60 * 90) / 100
    assert area_under(curve, 0, 100, before=10.0) == pytest.approx(expected, abs=0.1)
    assert area_under(curve, 20, 40, before=0.0) == pytest.approx(70)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny profile with few images, two hypernetworks and four anytime networks."""
    raw = read_merged(ROOT / "params.yaml", ROOT / "profiles" / "tiny.yaml")
    values = raw["anytime"] | {"variants": {"stacked": {"stacked": True}, "larger": {"train_nodes": 3, "layers": 2}}}
    values = values | {"batch_size": 20, "blocks": values["blocks"] | {"networks": 5, "cells": 2},
                       "exits": values["exits"] | {"candidates": 4, "chosen": 2, "steps": 30}}  # fmt: skip
    read = validate(raw)
    setup = Setup(
        "anytime",
        read.profile,
        read.seed,
        tmp_path_factory.mktemp("anytime"),
        data=read.data,
        anytime=Anytime.of(values),
    )
    images = digits(image_size=16)
    vars(setup)["images"] = ImageSplits(
        *(part.few_shot(20, seed=0) for part in (images.train, images.val, images.test))
    )
    return setup


@pytest.fixture(scope="module")
def ranking(setup):
    return anytime.rank_blocks(setup)


@pytest.fixture(scope="module")
def candidates(setup):
    return anytime.predict_candidates(setup)


@pytest.fixture(scope="module")
def compared(setup, candidates):
    return anytime.compare_anytime(setup, candidates)


def test_each_hypernetwork_ranks_the_same_larger_blocks(setup, ranking):
    assert (
        list(ranking.scores) == ["stacked", "larger", "parameters"] and len(ranking.scores) == len(ranking.trained) == 5
    )
    space = anytime._block_space(setup, 3)
    trained_on, ranked = (anytime.networks_of(setup, space, split, 3) for split in ("train", "test"))
    assert {len(a.genotype.normal) for a in trained_on} == {2 * 3} and {len(a.genotype.normal) for a in ranked} == {
        2 * 4
    }
    ghn = GHN.from_pretrained(setup.folder / "larger" / "model")
    assert ghn.config.layers == 2
    predicted = exit_accuracies(ranked[1].build(), setup.images.val, parameters=ghn.predict(ranked[1].graph))
    assert ranking.scores["larger"][1] == pytest.approx(predicted[0])
    expected = rank_correlations(ranking.scores, ranking.trained["accuracy"])
    pd.testing.assert_frame_equal(ranking.correlations["all"], expected)
    assert (ranking.correlations["top half"]["n"] == 2).all()


def test_the_table_of_hypernetworks_says_what_they_are(setup, ranking):
    table = anytime.ranking_table(setup, ranking)
    assert table.loc["larger", ["T", "training nodes"]].tolist() == [2, 3]
    assert table.loc["stacked", "of GHN-2"] == "weight normalisation, shape encoding, layer norm"
    assert table.loc["parameters", ["T", "accuracy (%)"]].isna().all() and table["tau, all"].notna().all()


def ranking_of(**taus):
    rows = pd.DataFrame(
        {name: {"n": 30, "tau": tau, "low": tau - 0.1, "high": tau + 0.1, "r": tau} for name, tau in taus.items()}
    ).T
    return Ranking(pd.DataFrame(), pd.DataFrame(), {"all": rows, "top half": rows})


def test_claims_of_ranking_are_of_the_variants_that_there_are():
    claims = anytime.claims_of_ranking(ranking_of(stacked=0.6, separate=0.2, synchronous=0.3, parameters=0.7))
    assert {name: round(claim.value, 6) for name, claim in claims.items()} == {
        "blocks-stacked": 0.6,
        "blocks-stacked-separate": 0.4,
    }
    claims = anytime.claims_of_ranking(
        ranking_of(passing=0.1, separate=0.2, synchronous=0.3, **{"forward-backward": 0.6})
    )
    assert {name: claim.verdict for name, claim in claims.items()} == {
        "blocks-passing-separate": "not decided", "blocks-forward-backward": "held",
    }  # fmt: skip
    assert not anytime.claims_of_ranking(ranking_of(stacked=math.nan))


def test_lines_join_hypernetworks_that_differ_in_one_thing(setup):
    base = setup.anytime.model_dump()
    variants = {
        "two": {"train_nodes": 2},
        "three": {"train_nodes": 3},
        "four": {"train_nodes": 4},
        "deep": {"layers": 2},
        "slow": {"lr": 1e-5},
    }
    own = replace(setup, anytime=Anytime.of({**base, "variants": variants}))
    taus = {"four": 0.4, "three": 0.3, "two": 0.2, "deep": 0.9, "slow": 0.8}
    ((axis, rows),) = anytime.lines_of_design(own, ranking_of(**taus))
    assert axis == "training nodes" and rows[axis].tolist() == [2, 3, 4] and rows["tau"].tolist() == [0.2, 0.3, 0.4]


def test_candidates_are_scored_by_the_area_under_their_curve(setup, candidates):
    ghn = GHN.from_pretrained(setup.folder / "exits" / "model")
    assert ghn.config.anytime
    curve = candidates.curves[candidates.curves["network"] == 2]
    network = candidates.networks[2]
    assert curve["FLOPs"].tolist() == exit_flops(network) and curve["exit"].tolist() == [0, 1, 2, 3]
    predicted = exit_accuracies(network.build(), setup.images.val, parameters=ghn.predict(network.graph))
    assert curve["accuracy"].tolist() == pytest.approx(predicted)
    low, high = candidates.budgets
    assert (low, high) == (candidates.curves["FLOPs"].min(), candidates.curves["FLOPs"].max())
    assert candidates.areas[2] == area_under(curve, low, high, before=10.0)


def test_the_best_are_trained_beside_random_ones_and_an_msdnet_of_their_cost(setup, candidates, compared):
    assert compared.best == candidates.areas.nlargest(2).index.tolist() and len(set(compared.drawn)) == 2
    assert compared.curves.groupby(["group", "network"]).size().eq(4).all() and 0.5 < compared.msdnet_cost < 2
    curves = compared.curves.set_index(["group", "network"])
    network, seed = candidates.networks[compared.drawn[1]], mix(setup.seed, 1)
    torch.manual_seed(seed)
    net = network.build(device="cpu", track_running_stats=True)
    recipe = TrainingRecipe(30, setup.anytime.lr, 20, augment=setup.augment)
    (accuracies,) = train_network(
        net, setup.images.train, recipe, seed, lambda net: exit_accuracies(net, setup.images.test, 256)
    ).values()
    assert curves.loc[(RANDOM, 1), "accuracy"].tolist() == accuracies
    assert compared.with_predicted["group"].unique().tolist() == [CHOSEN, RANDOM, "MSDNet", anytime.PREDICTED]
    assert compared.agreement()["n"] == len({*compared.best, *compared.drawn})
    assert anytime.area_table(compared)["networks"].tolist() == [2, 2, 2]


def flat(accuracies):
    """Curves of two exits, group -> accuracies of its networks at all budgets."""
    rows = [{"group": group, "network": n, "exit": k, "FLOPs": 10 + 10 * k, "accuracy": accuracy}
            for group, values in accuracies.items() for n, accuracy in enumerate(values) for k in (0, 1)]  # fmt: skip
    return pd.DataFrame(rows)


def test_claims_are_differences_of_mean_areas_and_what_diverged_is_left_out():
    curves = flat({CHOSEN: [50.0, 54.0, math.nan], RANDOM: [40.0, 41.0, 42.0], "MSDNet": [60.0, 60.0, 60.0]})
    candidates = Candidates([None] * 5, flat({"": [20.0, 30.0, 40.0, 10.0, 15.0]}).drop(columns="group"), 10.0)
    found = Comparison(candidates, curves, best=[2, 1, 0], drawn=[1, 3, 4])
    assert found.failed == [f"{CHOSEN}, network 2"]
    claims = anytime.claims_of_areas(found)
    assert claims["anytime-random"] == mean_interval([50, 54]).over(mean_interval([40, 41, 42]))
    assert claims["anytime-msdnet"].value == -8
    assert found.mean_curves(3)[CHOSEN].tolist() == [52.0] * 3
    agreement = found.agreement()  # of 2, 3, 4 and 1, which is in both groups
    assert agreement["n"] == 4 and agreement["tau"] == pytest.approx(rank_correlations(
        pd.DataFrame({"predicted": [40.0, 30.0, 10.0, 15.0]}), [50.0, 54.0, 41.0, 42.0])["tau"].iloc[0])  # fmt: skip
    nothing = replace(found, curves=curves[curves["group"] != "MSDNet"])
    assert list(anytime.claims_of_areas(nothing)) == ["anytime-random"]


def test_a_training_that_diverges_has_costs_but_no_accuracy(setup, candidates):
    own = replace(setup, anytime=setup.anytime.model_copy(update={"lr": math.inf}))
    vars(own)["images"] = setup.images
    found = anytime.compare_anytime(own, candidates)
    assert found.curves["accuracy"].isna().all() and (found.curves["FLOPs"] > 0).all()
    assert len(found.failed) == 6 and found.areas.isna().all() and not anytime.claims_of_areas(found)
    assert np.isfinite(found.msdnet_cost)
