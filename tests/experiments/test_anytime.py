"""The report on GHN 2018: anytime networks, the hypernetwork that is told of scales and exits, ranking of blocks, curves
of accuracy over FLOPs."""

import math
import pickle
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from shared import ROOT, digits, params, tiny

from ghnlib import GHN, DeepNets, GHNConfig
from ghnlib.config import PRESETS, Recipe
from ghnlib.data.images import mix
from ghnlib.data.sources import ImageSplits
from ghnlib.deepnets.ghn2018 import AnytimeSpace, BlockSpace
from ghnlib.experiments.anytime import blocks, exits
from ghnlib.experiments.anytime.blocks import Ranking
from ghnlib.experiments.anytime.exits import CHOSEN, GEOMETRY, MSDNET, RANDOM, Candidates, ComparedAnytime, area_under
from ghnlib.experiments.anytime.msdnet import MSDNetArchitecture, exit_flops
from ghnlib.experiments.one_shot import CEILING
from ghnlib.experiments.setup import Setup
from ghnlib.graphs.graph import Graph
from ghnlib.graphs.nodes import Role
from ghnlib.measuring.accuracy import exit_accuracies
from ghnlib.measuring.costs import flops, inference_flops, step_flops
from ghnlib.params import Anytime
from ghnlib.params_file import read_merged, validate
from ghnlib.reporting.statistics import mean_interval, over_trainings
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
    preset = {**PRESETS["ghn"], "num_classes": 10, "max_shape": (16, 16, 7, 7)}
    config, recipe = params().anytime.config("vanilla"), params().anytime.recipe_of("vanilla")
    assert config.stacked and config.passing and (config.modules, config.directions, config.layers) == (1, "both", 5)
    assert config == GHNConfig(**preset) and params("cifar10").anytime.config("vanilla") == GHNConfig(**PRESETS["ghn"])
    rates = [recipe.rate_factor(round(share * recipe.steps), 1) for share in (0, 0.49, 0.5, 0.74, 0.75, 0.99)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    torch.manual_seed(0)
    trainer = MetaTrainer(GHN({**preset, "max_shape": (8, 8, 3, 3)}), Recipe(meta_batch=1, dropout=False, warmup=0), 1)
    losses = [trainer.step([arch()], *batch(), seed=0)["loss"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_exits_are_scored_one_by_one():
    scored = exit_accuracies(net(), digits(image_size=16).val, batch_size=50)
    correct = torch.zeros(3)
    for images, labels in digits(image_size=16).val.batches(50):
        correct += torch.tensor([(logits.argmax(1) == labels).sum() for logits in net()(images)])
    assert scored == pytest.approx((100 * correct / len(digits(image_size=16).val)).tolist())


def test_an_msdnet_has_the_published_structure():
    """Dense, at three scales of which the finest go one after the other, with bottlenecks and strided classifiers."""
    built = MSDNetArchitecture(6, 3, 6, 4, 10, 32).build(device="cpu").eval()
    shapes = []
    for layer in built.layers:
        layer.register_forward_hook(lambda layer, maps, out: shapes.append([tuple(m.shape[1:3]) for m in out]))
    assert [logits.shape for logits in built(torch.zeros(2, 3, 32, 32))] == [(2, 10)] * 4
    assert shapes == [
        [(12, 32), (24, 16), (48, 8)], [(18, 32), (36, 16), (72, 8)], [(30, 16), (60, 8)], [(42, 16), (84, 8)],
        [(66, 8)], [(90, 8)],
    ]  # fmt: skip
    of = lambda chain: [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in chain.modules()
                        if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    layer = built.layers[1]
    assert of(layer.same[1]) == [(24, 12, 1, 1), (12, 6, 3, 1)] and of(layer.finer[0]) == [(12, 6, 1, 1), (6, 6, 3, 2)]
    assert of(built.layers[2].drop) == [(36, 18, 1, 1), (72, 36, 1, 1)]
    assert of(built.heads[0]) == [(60, 120, 3, 2), (120, 120, 3, 2)]


@pytest.mark.parametrize("growth", [3, 12])
def test_a_multi_scale_densenet_of_given_flops_is_the_nearest(growth):
    architecture = MSDNetArchitecture(growth, 3, 3, 2, 10, 16)
    others = {key: value for key, value in vars(architecture).items() if key != "growth"}
    assert MSDNetArchitecture.of_flops(exit_flops(architecture)[-1], **others) == architecture


def test_the_area_under_a_curve_is_a_mean_accuracy_over_budgets():
    curve = pd.DataFrame({"FLOPs": [20, 40], "accuracy": [50.0, 90.0]})
    expected = (20 * 10 + 20 * 70 + 60 * 90) / 100
    assert area_under(curve, 0, 100, before=10.0) == pytest.approx(expected, abs=0.1)
    assert area_under(curve, 20, 40, before=0.0) == pytest.approx(70)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny profile with few images, two hypernetworks trained twice and four anytime networks."""
    raw = read_merged(ROOT / "params.yaml", ROOT / "profiles" / "tiny.yaml")
    values = raw["anytime"] | {"variants": {"vanilla": {"layers": 1}, "larger": {"train_nodes": 3, "layers": 2}}}
    values = values | {"sgd": values["sgd"] | {"batch_size": 20}, "seeds": [3, 4], "blocks": values["blocks"] | {"networks": 5, "cells": 2, "steps": 8, "shares": [0.028, 0.1, 0.25]},
                       "search": values["search"] | {"candidates": 5, "chosen": 2, "steps": 4},
                       "exits": values["exits"] | {"candidates": 4, "chosen": 2, "steps": 30, "sgd": values["sgd"] | {"batch_size": 20, "lr": 0.1, "schedule": "step-half"}}}  # fmt: skip
    read = validate(raw)
    folder = tmp_path_factory.mktemp("anytime")
    setup = Setup("anytime", read.profile, read.seed, folder, data=read.data, anytime=Anytime.of(values))
    images = digits(image_size=16)
    vars(setup)["images"] = ImageSplits(
        *(part.few_shot(20, seed=0) for part in (images.train, images.val, images.test))
    )
    return setup


@pytest.fixture(scope="module")
def hypernetworks(setup):
    return blocks.train_variants(setup)


@pytest.fixture(scope="module")
def ranking(setup, hypernetworks):
    return blocks.rank_blocks(setup, hypernetworks)


@pytest.fixture(scope="module")
def searched(setup, hypernetworks):
    return blocks.search_blocks(setup, hypernetworks["vanilla"])


@pytest.fixture(scope="module")
def candidates(setup):
    return exits.predict_candidates(setup)


@pytest.fixture(scope="module")
def compared(setup, candidates):
    return exits.compare_anytime(setup, candidates)


def predicted_accuracy(ghn, network, images):
    return exit_accuracies(network.build(), images, parameters=ghn.predict(network.graph))


def test_each_training_of_a_hypernetwork_ranks_the_same_larger_blocks(setup, hypernetworks, ranking):
    assert [list(scores) for scores in ranking.scores] == [["vanilla", "larger"]] * 2
    assert blocks.sgd_steps(setup) == {0.1: 1, 0.25: 2}, "2.8% of 8 steps are none"
    assert list(ranking.baselines) == ["SGD, 10%", "SGD, 25%", "one-shot", "parameters"]
    trained_on, ranked = (
        blocks.networks_of(setup, blocks.block_space(setup, 3), split, 3) for split in ("train", "test")
    )
    assert {len(a.genotype.normal) // 2 for a in trained_on} == {3}
    assert {len(a.genotype.normal) // 2 for a in ranked} == {4}
    ghn = GHN.from_pretrained(setup.folder / "larger-4" / "model")
    assert ghn.config.layers == 2 and not torch.equal(*(h.embedding.op.weight for h in hypernetworks["larger"]))
    assert ranking.scores[1]["larger"][1] == pytest.approx(predicted_accuracy(ghn, ranked[1], setup.images.val)[0])


def test_the_ground_truth_is_the_mean_of_two_trainings_whose_agreement_is_the_ceiling(ranking):
    runs = ranking.trained
    truths = [runs.loc[runs["run"] == run, "accuracy"].reset_index(drop=True) for run in (0, 1)]
    every, half = ranking.correlations()[0], ranking.correlations(half=True)[0]
    mean = sum(truths) / 2
    assert every["parameters"].value == pytest.approx(np.corrcoef(ranking.baselines["parameters"], mean)[0, 1])
    assert every[CEILING].value == pytest.approx(np.corrcoef(*truths)[0, 1])
    assert every["parameters"].n == 5 and half["parameters"].n == 2 and math.isnan(half["parameters"].value)


def test_the_table_of_hypernetworks_says_what_they_are(setup, ranking):
    table = blocks.ranking_table(setup, ranking)
    assert table.loc["larger", ["T", "training nodes"]].tolist() == [2, 3]
    assert "refinements of GHN-2" not in table and "±" in table.loc["vanilla", "accuracy (%)"]
    assert table.loc["parameters", ["T", "accuracy (%)"]].isna().all() and "[" in table.loc["parameters", "R, all"]
    refined = Anytime.of(setup.anytime.model_dump() | {"variants": {"vanilla": {"layernorm": True}}})
    own = blocks.ranking_table(replace(setup, anytime=refined), ranking)
    assert own.loc["vanilla", "refinements of GHN-2"] == "layer norm"


def ranking_of(*trainings):
    """Of four architectures whose ground truth is 0, 1, 2, 3; each training: name -> score."""
    trained = pd.DataFrame({"network": [0, 1, 2, 3] * 2, "run": [0] * 4 + [1] * 4, "accuracy": [0.0, 1, 2, 3] * 2})
    baselines = pd.DataFrame({"one-shot": [0.0, 1, 3, 2], "parameters": [1.0, 2, 3, 4]})
    return Ranking([pd.DataFrame(scores, dtype=float) for scores in trainings], baselines, trained)


def test_claims_of_ranking_are_differences_within_a_training_of_the_variants_that_there_are():
    first = {"vanilla": [0, 1, 2, 3], "separate": [0, 2, 1, 3]}
    second = {"vanilla": [0, 1, 3, 2], "separate": [3, 2, 1, 0]}
    found, alone = blocks.claims_of_ranking(ranking_of(first, second)), blocks.claims_of_ranking(ranking_of(first))
    assert list(found) == ["blocks-stacked", "blocks-stacked-separate", "blocks-one-shot"]
    values = {name: claim.value for name, claim in found.items()}
    assert values == pytest.approx({"blocks-stacked": 0.9, "blocks-stacked-separate": 1.0, "blocks-one-shot": 0.1})
    assert {claim.trainings for claim in found.values()} == {2}
    assert {claim.verdict for claim in alone.values()} == {"not decided (one training)"}
    assert list(blocks.claims_of_ranking(ranking_of({"vanilla": [1] * 4, "passing": [0, 1, 2, 3]}))) == []


def test_lines_join_hypernetworks_that_differ_in_one_thing(setup):
    variants = {"two": {"train_nodes": 2}, "three": {"train_nodes": 3}, "four": {"train_nodes": 4},
                "deep": {"layers": 2}, "slow": {"lr": 1e-5}}  # fmt: skip
    own = replace(setup, anytime=Anytime.of({**setup.anytime.model_dump(), "variants": variants}))
    scores = dict.fromkeys(variants, [0, 1, 2, 3])
    ((axis, rows),) = blocks.lines_of_design(own, ranking_of(scores, scores | {"four": [3, 2, 1, 0]}))
    assert axis == "training nodes" and rows[axis].tolist() == [2, 2, 3, 3, 4, 4]
    assert sorted(rows.loc[rows[axis] == 4, "R"]) == pytest.approx([-1, 1])


def test_each_training_chooses_blocks_and_all_chosen_are_trained_once(setup, hypernetworks, searched):
    scores = [[predicted_accuracy(ghn, network, setup.images.val)[0] for network in searched.networks]
              for ghn in hypernetworks["vanilla"]]  # fmt: skip
    for best, of in zip(searched.best, scores, strict=True):
        assert min(of[i] for i in best) >= max(of[i] for i in range(5) if i not in best) and len(best) == 2
    assert searched.trained["network"].tolist() == sorted({*searched.drawn, *sum(searched.best, [])})
    assert searched.tested.notna().all()


def search_of(accuracy, tested, best, drawn):
    rows = pd.DataFrame({"network": range(len(tested)), "accuracy": accuracy, "test accuracy": tested})
    return blocks.Search(blocks_of_search(), best, drawn, rows)


@cache
def blocks_of_search():
    return list(DeepNets("search", space=BlockSpace(nodes=2, cells=(2, 2), width=16), size=5, input_size=16))


def test_what_a_search_finds_is_compared_with_random_blocks(setup):
    found = search_of([9, 8, 7, 6, 5], [50.0, 60.0, 70.0, 20.0, 22.0], best=[[0, 1], [1, 2]], drawn=[3, 4])
    assert found.top_best == [0, 1]
    claim = found.claims["blocks-top"]
    expected = [mean_interval(best).minus(mean_interval([20, 22])) for best in ([50, 60], [60, 70])]
    assert claim == over_trainings(expected) and claim.value == 39
    table = blocks.search_table(setup, found)
    assert table["test accuracy (%)"].tolist() == ["21.0 (n = 2)", "60.0 ± 7.1", "55.0 ± 7.1"]
    random, top, top_best = table["TFLOPs"].astype(float)
    networks, last = found.networks, setup.anytime.search
    assert random == 0 < top and top_best - top == pytest.approx(
        last.chosen * last.steps * 20 * step_flops(networks) / 1e12, rel=0.05
    )
    assert not search_of([9] * 5, [math.nan] * 5, best=[[0, 1]], drawn=[3, 4]).claims


def test_the_best_block_is_transferred_as_wide_as_the_limit_of_flops_allows(setup, searched):
    network = blocks_of_search()[0]
    limit = 3 * inference_flops(network)
    wide = blocks.widest(network, limit)
    assert inference_flops(wide) <= limit < inference_flops(replace(wide, C=wide.C + 2))
    found = blocks.transfer_blocks(setup, searched)
    assert (found.rows["MFLOPs"] <= setup.anytime.search.mflops).all() and not found.differs and not found.claims
    assert found.rows.index.tolist() == sorted({*searched.top_best, *searched.drawn[: setup.anytime.search.chosen]})
    rows = pd.DataFrame({"test accuracy": [50.0, 60.0, 20.0, 22.0]})
    claim = blocks.TransferredBlocks([0, 1], [2, 3], rows, differs=True).claims["blocks-transfer"]
    assert claim.value == 34 and claim.trainings == 2
    without = setup.anytime.search.model_copy(update={"second": None})
    assert not blocks.transfer_blocks(
        replace(setup, anytime=setup.anytime.model_copy(update={"search": without})), searched
    )


def test_candidates_are_scored_by_the_area_under_their_curve(setup, candidates):
    ghn = GHN.from_pretrained(setup.folder / "exits-4" / "model")
    assert ghn.config.anytime
    curve = candidates.curves.query("network == 2 and training == 1")
    network = candidates.networks[2]
    assert curve["FLOPs"].tolist() == exit_flops(network) and curve["exit"].tolist() == [0, 1, 2, 3]
    assert curve["accuracy"].tolist() == pytest.approx(predicted_accuracy(ghn, network, setup.images.val))
    low, high = candidates.budgets
    assert (low, high) == (candidates.curves["FLOPs"].min(), candidates.curves["FLOPs"].max())
    assert candidates.areas.loc[2, 1] == area_under(curve, low, high, before=10.0)


def test_geometry_ranks_by_the_cost_of_the_first_exit_whatever_is_predicted():
    curves = flat({"": [20.0, 90.0, 40.0]}).drop(columns="group").assign(training=0)
    curves["FLOPs"] += curves["network"].map({0: 5, 1: 9, 2: 0})
    found = Candidates([None] * 3, curves, 10.0).geometry
    assert found.sort_values(ascending=False).index.tolist() == [2, 0, 1]


def test_the_best_are_trained_beside_others_and_an_msdnet_of_their_cost(setup, candidates, compared):
    assert compared.best == [candidates.areas[k].nlargest(2).index.tolist() for k in (0, 1)]
    geometry, drawn = compared.groups[GEOMETRY], compared.groups[RANDOM]
    assert geometry == candidates.geometry.nlargest(2).index.tolist() and len(set(drawn)) == 2
    assert compared.curves.groupby("network").size().eq(4).all() and 0.5 < compared.msdnet_cost < 2
    network, seed = candidates.networks[drawn[1]], mix(setup.seed, drawn[1])
    torch.manual_seed(seed)
    net = network.build(device="cpu", track_running_stats=True)
    recipe = TrainingRecipe(30, 0.1, 20, schedule="step-half", augment=setup.augment)
    (accuracies,) = train_network(
        net, setup.images.train, recipe, seed, lambda net: exit_accuracies(net, setup.images.test, 256)
    ).values()
    assert compared.curves.loc[compared.curves["network"] == drawn[1], "accuracy"].tolist() == accuracies
    assert compared.with_predicted["group"].unique().tolist() == [CHOSEN, GEOMETRY, RANDOM, MSDNET, exits.PREDICTED]
    (by_costs,) = compared.agreement()[GEOMETRY]
    assert by_costs.n == len({*sum(compared.best, []), *geometry, *drawn})
    assert exits.area_table(compared).index.tolist() == [CHOSEN, GEOMETRY, RANDOM, MSDNET]


def flat(accuracies):
    """Curves of two exits, group -> accuracies of its networks at all budgets."""
    rows = [{"group": group, "network": n, "exit": k, "FLOPs": 10 + 10 * k, "accuracy": accuracy}
            for group, values in accuracies.items() for n, accuracy in enumerate(values) for k in (0, 1)]  # fmt: skip
    return pd.DataFrame(rows)


def comparison_of(areas, best, **groups):
    """Of networks (0, 1, ..., -1: a multi-scale DenseNet) with flat curves at these areas after training."""
    rows = [{"network": n, "exit": k, "FLOPs": 10 + 10 * k, "accuracy": area}
            for n, area in areas.items() for k in (0, 1)]  # fmt: skip
    predicted = pd.concat([flat({"": [20.0, 30.0, 40.0, 10.0, 15.0]}).assign(training=k) for k in range(len(best))])
    candidates = Candidates([None] * 5, predicted.drop(columns="group"), 10.0)
    return ComparedAnytime(
        candidates, pd.DataFrame(rows), best, {GEOMETRY: [0], RANDOM: [3, 4], MSDNET: [-1], **groups}
    )


def test_claims_are_differences_of_mean_areas_within_a_training_and_what_diverged_is_left_out():
    areas = {0: 50.0, 1: 54.0, 2: math.nan, 3: 41.0, 4: 42.0, -1: 60.0}
    found = comparison_of(areas, best=[[2, 1, 0], [1, 0]])
    assert found.failed == ["network 2"]
    claims, random = exits.claims_of_areas(found), mean_interval([41, 42])
    assert claims["anytime-random"] == over_trainings([mean_interval([50, 54]).minus(random)] * 2)
    assert claims["anytime-geometry"].value == 2 and claims["anytime-msdnet"].value == -8
    assert claims["anytime-msdnet"].trainings == 2
    assert found.mean_curves(3)[CHOSEN].tolist() == [52.0] * 3
    agreement = found.agreement()[CHOSEN][1]
    assert agreement.n == 4 and agreement.value == pytest.approx(
        np.corrcoef([20.0, 30, 10, 15], [50.0, 54, 41, 42])[0, 1]
    )
    assert exits.area_table(found).loc[CHOSEN, "area (%)"] == "52.0"
    nothing = comparison_of(areas | {-1: math.nan}, best=[[0, 1]])
    assert list(exits.claims_of_areas(nothing)) == ["anytime-random", "anytime-geometry"]


def test_a_training_that_diverges_has_costs_but_no_accuracy(setup, candidates):
    own = setup.anytime.exits
    diverging = own.model_copy(update={"sgd": own.sgd.model_copy(update={"lr": math.inf})})
    own = replace(setup, anytime=setup.anytime.model_copy(update={"exits": diverging}))
    vars(own)["images"] = setup.images
    found = exits.compare_anytime(own, candidates)
    assert found.curves["accuracy"].isna().all() and (found.curves["FLOPs"] > 0).all()
    assert len(found.failed) == len(found.areas) and found.areas.isna().all() and not exits.claims_of_areas(found)
    assert np.isfinite(found.msdnet_cost)


def test_exits_are_drawn_in_red():
    axes = plt.subplots()[1]
    exits.draw_anytime(arch(), axes)
    colours = axes.collections[-1].get_facecolors()
    red = [i for i, colour in enumerate(colours) if tuple(colour) == to_rgba("tab:red")]
    assert len(colours) == len(net().shrinks) and red == sorted(maps[0] for maps in net().exits[:-1])
    plt.close("all")
