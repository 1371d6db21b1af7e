"""The report on accuracy without training: what is counted, compared and trained, on few small networks."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from shared import ROOT, params

from ghnlib import GHN
from ghnlib.architectures.vision import own_networks
from ghnlib.data.images import DataError
from ghnlib.data.sources import ImageSplits, images_of
from ghnlib.experiments.evaluate import ablations, network_sizes, scaling
from ghnlib.experiments.evaluate.accuracy import (
    Evaluation,
    accuracy_table,
    best_networks,
    claims_without_training,
    compare_batch_norm,
    evaluate_networks,
    evaluate_torchvision_networks,
    leads,
    means_by_split,
    torchvision_table,
)
from ghnlib.experiments.evaluate.initialisations import compare_initialisations
from ghnlib.experiments.evaluate.own_networks import evaluate_own_networks
from ghnlib.experiments.evaluate.quantisation import evaluate_quantised
from ghnlib.experiments.setup import Setup
from ghnlib.measuring.accuracy import NOT_FINITE, predicted_accuracies
from ghnlib.measuring.costs import flops, inference_flops, step_flops
from ghnlib.params import Data, Evaluate
from ghnlib.params_file import read_merged, validate
from ghnlib.reporting.publish import claim_of
from ghnlib.reporting.statistics import with_deviation
from ghnlib.variants import Train, TrainVariant

HANDWRITTEN = "ghnlib.architectures.handwritten"
SMALL = {"hid": 16, "layers": 1, "heads": 2, "max_shape": [16, 16, 11, 11]}
VARIANTS = {
    "mlp": {"encoder": "mlp", "window": "corner"},
    "ghn2": {"encoder": "gated_gnn", "window": "corner"},
    "ghn3": {"encoder": "graphormer"},
    "ghn3-wrong": {"encoder": "graphormer", "batching": "misaligned"},
    "ghn3-short": {"encoder": "graphormer", "batching": "misaligned", "steps": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def untrained(folder):
    """Hypernetworks mlp and ghn2 as they are made, with histories as if they had been trained."""
    raw = read_merged(ROOT / "params.yaml", ROOT / "profiles" / "tiny.yaml")
    train = Train.of({**raw["train"], "seeds": [0, 1], "ghn": {**raw["train"]["ghn"], **SMALL}, "variants": VARIANTS})
    sections = {
        "initialised_lrs": [1e20, 0.01],
        "learned_steps": 3,
        "sgd": {**raw["evaluate"]["sgd"], "batch_size": 50},
        "ood_networks": 1,
    }
    params, data = validate(raw), Data.of({**raw["data"], "image_size": 8})
    images = images_of(data, params.seed)
    setup = Setup("evaluate", params.profile, params.seed, folder / "kept", metrics=params.metrics, data=data,
                  deepnets=params.deepnets, train=train, evaluate=Evaluate.of({**raw["evaluate"], **sections}))  # fmt: skip
    vars(setup)["images"] = ImageSplits(
        *(part.few_shot(10, seed=0) for part in (images.train, images.val, images.test))
    )
    vars(setup)["hypernetworks"] = hypernetworks = {}
    for name, accuracy in (("mlp", 30.0), ("ghn2", 20.0)):
        hypernetworks[name] = {}
        for seed in train.seeds:
            torch.manual_seed(seed)
            hypernetworks[name][seed] = GHN(train.config(name))
            rows = {"step": [2, 4, 6], "loss": [3.0, 2.0, 1.0], "grad_norm": [1.0, 3.0, 5.0], "grad_norm_deviation": [0.0, 0.0, 3.0],
                    "validation_accuracy": [math.nan, math.nan, accuracy + 15 * seed * (name == "ghn2")]}  # fmt: skip
            Path(folder, "models", f"{name}-{seed}").mkdir(parents=True)
            pd.DataFrame(rows).to_csv(folder / "models" / f"{name}-{seed}" / "history.csv", index=False)
    return setup


@pytest.fixture
def setup(untrained, folder, monkeypatch):
    monkeypatch.chdir(folder)
    known = untrained.train.model_copy(
        update={"variants": {name: untrained.train.variants[name] for name in ("mlp", "ghn2")}}
    )
    own = replace(untrained, train=known)
    vars(own).update(images=untrained.images, hypernetworks=untrained.hypernetworks)
    return own


@pytest.fixture
def splits(setup):
    few = {split: [setup.split(split)[0]] for split in ("wide", "deep", "dense", "bnfree")}
    return {"test": list(setup.split("test")), **few, "predefined": [setup.split("val")[1]]}


@pytest.fixture
def evaluation(setup, splits):
    return evaluate_networks(setup, splits)  # kept after the first time


def rows_of(accuracies, split="test", seed=0, **more):
    """Rows of one split and seed, method -> accuracies."""
    sizes = {
        "nodes": range(10, 14),
        "path": [1.0, 2.0, 3.0, 4.0],
        "batch_norm": True,
        "width": 16,
        "depth": [4, 5, 6, 7],
    }
    parts = [
        pd.DataFrame({"method": method, "seed": seed, "split": split, "index": range(len(values)), "accuracy": values, "top5": 50.0, "error": "",
                      **{name: value if np.isscalar(value) else list(value)[: len(values)] for name, value in {**sizes, **more}.items()}})
        for method, values in accuracies.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_what_diverged_counts_as_0_and_what_failed_is_left_out():
    rows = rows_of({"ghn2": [80.0, math.nan, math.nan], "random": [10.0, math.nan, 20.0]})
    rows["error"] = ["", NOT_FINITE, "ValueError: too large", "", "", ""]
    found = Evaluation(rows, ["ghn2"], ["ghn2"], "ghn2")
    assert (len(found.missing), len(found.diverged)) == (3, 2)
    assert found.test["ghn2"].dropna().tolist() == [80.0, 0.0] and found.test["random"].tolist() == [10.0, 0.0, 20.0]
    assert leads(found)["ghn2 - random"][0::3] == (35.0, 2)
    assert means_by_split(found.counted)["ghn2"]["test"]["n"] == 2
    assert found.tidy["top1"].isna().sum() == 3


def test_claims_are_leads_over_the_same_networks_and_of_batch_norm():
    rows = pd.concat([rows_of({"ghn2": [50.0, 60.0, 70.0], "ghn3": [56.0, 64.0, 74.0], "SGD, 1 epoch": [60.0, 60.0]}),
                      rows_of({"ghn2": [10.0, 12.0]}, "bnfree", batch_norm=False)], ignore_index=True)  # fmt: skip
    rows.loc[(rows["index"] == 2) & (rows["split"] == "test"), "batch_norm"] = False
    claims = claims_without_training(Evaluation(rows, ["ghn2", "ghn3"], ["ghn2"], "ghn3"))
    assert {name: round(claim.value, 9) for name, claim in claims.items()} == {
        "without-training-ghn3-ghn2": round(14 / 3, 9),
        "without-training-ghn3-epoch": 0.0,
        "without-batch-norm": 44.0,
    }
    assert claims["without-training-ghn3-ghn2"].low > 0 and claims["without-training-ghn3-epoch"].n == 2


def test_leads_are_those_of_each_training_and_the_methods_without_one_are_shared():
    rows = pd.concat([rows_of({"ghn2": [50.0, 60.0], "ghn3": [60.0, 70.0], "random": [10.0, 12.0]}),
                      rows_of({"ghn2": [54.0, 64.0], "ghn3": [58.0, 68.0]}, seed=1)], ignore_index=True)  # fmt: skip
    found = Evaluation(rows, ["ghn2", "ghn3"], ["ghn2", "ghn3"], "ghn3")
    assert found.test["ghn3"].tolist() == [59.0, 69.0] and [test["ghn2"].tolist() for test in found.tests] == [
        [50.0, 60.0],
        [54.0, 64.0],
    ]
    lead = leads(found)["ghn3 - ghn2"]
    assert (lead.value, lead.n, lead.trainings) == (7.0, 2, 2)
    assert lead.high - lead.value == pytest.approx(stats.t.ppf(0.975, 1) * np.std([10, 4], ddof=1) / 2**0.5)
    assert lead.verdict == "not decided" and leads(found)["ghn2 - random"].value == 46.0
    table = accuracy_table(found)
    assert table["test"].to_dict() == {"random": "11.0 (n = 2)", "ghn2": "57.0 ± 2.8", "ghn3": "64.0 ± 1.4"}
    of_ghn2 = means_by_split(found.counted)["ghn2"]["test"]
    assert (of_ghn2["mean"], of_ghn2["n"], of_ghn2["trainings"]) == (57.0, 2, 2)
    assert of_ghn2["deviation"] == pytest.approx(50**0.5)
    assert of_ghn2["over_trainings"] == pytest.approx(8**0.5)


def test_one_training_decides_no_claim():
    found = Evaluation(
        rows_of({"ghn2": [50.0, 60.0], "ghn3": [80.0, 90.0]}), ["ghn2", "ghn3"], ["ghn2", "ghn3"], "ghn3"
    )
    assert claims_without_training(found)["without-training-ghn3-ghn2"].verdict == "not decided (one training)"


def test_each_hypernetwork_is_evaluated_and_yardsticks_are_trained(setup, splits, evaluation, capsys):
    rows = evaluation.rows.set_index(["method", "seed", "split", "index"])
    assert evaluation.methods == ["random", "mlp", "ghn2", "SGD, 1 epoch", "SGD, 2 epochs"]
    assert (evaluation.best, evaluation.compared) == ("mlp", ["mlp", "ghn2"])  # 30 on average, ghn2 27.5
    counts = evaluation.rows.groupby(["method", "split"]).size()
    assert counts["ghn2"].to_dict() == {"test": 6, "wide": 2, "deep": 2, "dense": 2, "bnfree": 2, "predefined": 2}
    assert counts["random"].to_dict() == {"test": 2, "wide": 1, "deep": 1, "dense": 1, "bnfree": 1}
    assert counts["SGD, 1 epoch"].equals(counts["random"])
    expected = predicted_accuracies(splits["deep"][0], setup.hypernetworks["ghn2"][1], setup.images.test, 64)
    assert rows.loc[("ghn2", 1, "deep", 0), ["accuracy", "top5"]].to_dict() == expected
    assert rows.loc[("ghn2", 0, "deep", 0), "nodes"] == len(splits["deep"][0].graph)
    assert not rows.loc[("mlp", 0, "bnfree", 0), "batch_norm"]
    assert list(evaluation.tidy) == ["method", "seed", "split", "index", "nodes", "path", "depth", "width", "parameters", "batch_norm", "top1",
                                     "top5", "balanced_accuracy", "macro_f1", "auc", "error"]  # fmt: skip
    best = best_networks(evaluation, 2)
    assert best["mlp"].tolist() == evaluation.test["mlp"].round(1).nlargest(2).tolist() and "random" in best


def accuracies_of(evaluation, method):
    rows = evaluation.counted[(evaluation.counted["method"] == method) & (evaluation.counted["split"] == "test")]
    return [of_training["accuracy"] for _, of_training in rows.groupby("seed")]


def test_the_table_of_accuracies(evaluation):
    table, (first, second) = accuracy_table(evaluation), accuracies_of(evaluation, "mlp")
    a, b = first.mean(), second.mean()
    assert table["test"]["mlp"] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"
    assert table["best of test"]["mlp"] == pytest.approx(((first.to_numpy() + second.to_numpy()) / 2).max(), abs=0.051)
    assert table["n test"].to_dict() == {"random": 2, "mlp": 3, "ghn2": 3, "SGD, 1 epoch": 2, "SGD, 2 epochs": 2}
    assert table["top-5, test"].isna().to_dict() == {name: name not in ("mlp", "ghn2") for name in table.index}
    assert table["ResNet-50"].isna()["random"] and table["ResNet-50"]["mlp"] and table["ViT"].isna().all()


def test_another_metric_takes_the_place_of_accuracy(setup, splits, evaluation):
    net, ghn, images = splits["test"][1], setup.hypernetworks["ghn2"][1], setup.images.test
    own = evaluation.rows[(evaluation.rows["method"] == "ghn2") & (evaluation.rows["seed"] == 1)].iloc[1]
    found = predicted_accuracies(net, ghn, images, setup.evaluate.batch_size, metrics=["auc", "macro_f1"])
    assert own["auc"] == pytest.approx(found["auc"]) and own["macro_f1"] == pytest.approx(found["macro_f1"])
    by_area = evaluation.scored_by("auc")
    assert means_by_split(by_area.counted)["ghn2"]["test"]["mean"] == pytest.approx(by_area.test["ghn2"].mean())
    assert by_area.test["ghn2"][1] != evaluation.test["ghn2"][1]
    assert accuracy_table(by_area).loc["SGD, 1 epoch", "test"].startswith(f"{by_area.test['SGD, 1 epoch'].mean():.1f}")


def test_batch_norm_is_compared_on_the_first_networks_that_have_it(setup, splits, evaluation):
    protocols = compare_batch_norm(setup, splits, evaluation)
    with_norm = [split for split in ("test", "wide", "deep", "dense", "bnfree") if any(a.norm for a in splits[split])]
    assert {"test", "deep"} <= set(with_norm) and "bnfree" not in with_norm
    assert list(protocols.table.index) == [f"{name}, {split}" for name in ("mlp", "ghn2") for split in with_norm]
    gain, chosen = protocols.gains["ghn2"]["test"], [i for i, a in enumerate(splits["test"]) if a.norm][:2]
    statistics = setup.images.train, setup.evaluate.bn_batches, setup.seed
    both = [[predicted_accuracies(splits["test"][i], ghn, setup.images.test, 64, s)["accuracy"]
             for i in chosen for ghn in setup.hypernetworks["ghn2"].values()] for s in (statistics, None)]  # fmt: skip
    assert gain.value == pytest.approx(np.mean(both[0]) - np.mean(both[1])) and (gain.n, gain.trainings) == (2, 2)
    assert protocols.claims == {"training-statistics": gain}


def test_initialisations_have_costs_in_training_steps_and_accuracies_before_and_after(setup, splits):
    architectures = splits["test"][:2]
    found = compare_initialisations(setup, "mlp", architectures, ("random", "gradinit", "ghn", "xavier"))
    assert list(found.scores.columns) == [0, 2] and found.scores.stack().between(0, 100).all()
    assert set(found.scores.index.get_level_values(0)) == {"random", "gradinit", "ghn"}
    assert (
        found.failed["initialisation"].tolist() == ["xavier"] * 2
        and "unknown initialisation" in found.failed["error"].iloc[0]
    )
    assert (found.rows["lr"][found.rows["initialisation"] != "xavier"] == 0.01).all()  # the other diverges
    assert found.costs["random"] == 0 and found.costs["ghn"] > 0
    assert found.costs["gradinit"] > 3 * 2 / 3  # batches, a gradient on two thirds of each, and those held out
    assert found.claims["few-steps-gradinit"] == found.after["gradinit"] and set(found.after) == {"random", "gradinit"}
    assert found.rows.groupby("initialisation")["training"].unique().map(list).to_dict() == {
        "random": [0], "gradinit": [0], "ghn": [0, 1], "xavier": [0]
    }  # fmt: skip
    after = found.scores[2]
    expected = [after["ghn", seed] - after["random", 0] for seed in (0, 1)]
    assert found.after["random"].value == pytest.approx(np.mean(expected)) and found.after["random"].trainings == 2
    of_networks = found.scores.loc["ghn"][0].groupby("network").mean()
    before = found.means["ghn"]["0 steps"]
    assert (before["n"], before["mean"]) == (2, pytest.approx(of_networks.mean()))
    assert before["standard_error"] == pytest.approx(of_networks.sem())
    assert found.table.loc["xavier"].isna().tolist() == [True, False, True, True]


def test_initialisations_that_all_fail_stop_the_comparison(setup, splits):
    with pytest.raises(DataError, match="unknown initialisation 'xavier'"):
        compare_initialisations(setup, "mlp", splits["test"][:1], ("xavier",))


def test_the_cost_of_a_training_is_that_of_its_steps_networks_and_images(setup, splits):
    few = splits["test"][:2]
    costs = scaling.training_costs(setup, few)
    ghn = setup.hypernetworks["ghn2"][0]
    predicting = sum(flops(lambda a=a: ghn([a.graph], predict_class_layers=True)) for a in few) / 2
    networks = 8 * 3 * sum(map(inference_flops, few)) / 2
    assert costs.loc["ghn2", "flops"] == pytest.approx(6 * 2 * (networks + 3 * predicting))
    assert (costs.loc["ghn2", "grad_norm"], costs.loc["ghn2", "encoder"]) == (3.0, "gated_gnn")
    assert costs.loc["mlp", "grad_norm_deviation"] == pytest.approx(((1 + 9 + 25 + 9) / 3 - 9) ** 0.5)
    assert list(scaling.training_costs(setup, few[:1], ["mlp"]).index) == ["mlp"]
    assert step_flops(few) == (step_flops(few[:1]) + step_flops(few[1:])) / 2


def test_points_of_equal_models_and_steps_are_joined_where_meta_batches_differ():
    costs = pd.DataFrame({"encoder": "gated_gnn", "hid": [16, 16, 16, 32, 32], "layers": 1, "steps": [3, 3, 9, 3, 3], "meta_batch": [1, 8, 1, 2, 2],
                          "parameters": 1e6, "flops": 2e12, "grad_norm": [7.0, 2.0, 1.0, 1.0, 1.0], "grad_norm_deviation": 1.0,
                          scaling.TOP1: 50.0}, index=["ghn2-m1", "ghn2-m8", "ghn2-long", "a", "b"])  # fmt: skip
    points = scaling.scaling_points(costs, ["a"])
    assert points["line"].dropna().index.tolist() == ["ghn2-m1", "ghn2-m8"] and points["line"].nunique() == 1
    assert points["TFLOPs of training"].tolist() == [2.0] * 5
    by_batch = scaling.gradient_by_meta_batch(costs)["grad_norm"]
    assert by_batch.to_dict() == {("gated_gnn", 3, 1): 7.0, ("gated_gnn", 3, 2): 1.0, ("gated_gnn", 3, 8): 2.0}


def test_losses_are_those_of_models_with_several_meta_batches(setup):
    points = pd.DataFrame({"model": ["x", "x"], "meta_batch": [8, 1]}, index=["mlp", "ghn2"])  # two trainings each
    losses = scaling.losses_by_meta_batch(setup, points)
    assert (
        losses["variant"].unique().tolist() == ["ghn2, m = 1", "mlp, m = 8"]
        and losses["loss"].tolist() == [3.0, 2.0, 1.0] * 2
    )
    assert scaling.losses_by_meta_batch(setup, points.assign(meta_batch=1)).empty


def with_variants(setup, variants):
    """The setup with other variants, none of them trained."""
    train = setup.train.model_dump(mode="json", exclude_unset=True)
    return replace(setup, train=Train.of({**train, "variants": variants}))


def test_variants_that_differ_in_one_thing_are_compared(untrained):
    tests = [pd.DataFrame({name: [50.0, 60.0] for name in VARIANTS}) + [0, 0, lead, 0, 0] for lead in (7, 9)]
    found = ablations.claims_of_changes(untrained, tests)
    assert list(found) == ["batching/ghn3 over ghn3-wrong"] and found["batching/ghn3 over ghn3-wrong"].value == 8
    of_ghn3 = {"encoder": "graphormer"}
    changed = {"ghn3": of_ghn3 | {"gamma": 0.1}, "free": of_ghn3, "m8": of_ghn3 | {"gamma": 0.1, "meta_batch": 4},
               "long": of_ghn3 | {"gamma": 0.1, "meta_batch": 1, "steps": 12}, "wide": of_ghn3 | {"hid": 32}}  # fmt: skip
    other = with_variants(untrained, changed)
    frame = pd.DataFrame({name: [50.0, 60.0] for name in changed})
    assert set(ablations.claims_of_changes(other, [frame])) == {
        "penalty/ghn3 over free", "larger-hypernetwork/wide over free", "larger-meta-batch/m8 over ghn3",
        "meta-batch-equal-networks/ghn3 over long",
    }  # fmt: skip


def test_each_claim_of_the_ablation_tables_is_of_its_rows_alone(untrained):
    names = list(params("ablations").train.variants)
    setup = replace(untrained, train=params("ablations").train)
    tests = [pd.DataFrame({name: [50.0 - i + seed, 60.0 - i] for i, name in enumerate(names)}) for seed in (0, 2)]
    found = ablations.claims_of_changes(setup, tests)
    assert {key: round(lead.value) for key, lead in found.items()} == {
        f"{claim}/{ahead} over {behind}": names.index(behind) - names.index(ahead) for claim, ahead, behind in (
            ("batching", "ghn3-m4", "ghn3-m4-misaligned"), ("penalty", "ghn3", "ghn3-no-penalty"),
            ("meta-batch-equal-networks", "ghn3-m4", "ghn3"),
            ("normalisation", "ghn2-framework", "ghn2-framework-no-normalization"),
            ("virtual-edges", "ghn2", "ghn2-no-virtual-edges"), ("layernorm", "ghn2", "ghn2-no-layernorm"),
            ("shape-encoding", "ghn2", "ghn2-no-shape-encoding"), ("both-passes", "ghn2", "ghn2-forward"),
            ("conv-decoder", "ghn2", "ghn2-mlp-decoder"), ("more-architectures", "ghn2", "ghn2-100-architectures"),
            ("more-architectures", "ghn2", "ghn2-20-architectures"),
            ("more-architectures", "ghn2-100-architectures", "ghn2-20-architectures"),
            ("backward-edges", "ghn3", "ghn3-forward"), ("edges", "ghn3", "ghn3-no-edges"),
            ("attention", "ghn3", "ghn3-no-attention"), ("centrality", "ghn3", "ghn3-no-centrality"),
            ("input-distance", "ghn3", "ghn3-no-input-distance"),
        )
    }  # fmt: skip
    assert {claim_of(key).stage for key in found} == {"evaluate"}
    assert not ablations.claims_of_changes(replace(setup, train=params().train), [])


def test_rows_of_an_ablation_stand_beside_their_base(setup):
    of_ghn2 = {"encoder": "gated_gnn", "window": "corner"}
    variants = {"mlp": VARIANTS["mlp"], "ghn2": of_ghn2, "ghn2-forward": of_ghn2 | {"directions": "forward"},
                "ghn2-own": of_ghn2 | {"extra_share": 0.5}, "ghn3": VARIANTS["ghn3"]}  # fmt: skip
    setup = with_variants(setup, variants)
    tests = [pd.DataFrame({name: [50.0, 60.0] for name in variants}) - [30, 0, lead, 0, 0] for lead in (7, 9)]
    costs = pd.DataFrame({"parameters": range(5)}, index=list(variants))
    table = ablations.ablation_table(setup, tests, costs)
    assert table.reset_index().values.tolist() == [
        ["ghn2", "", "", "55.0", "", 1],
        ["ghn2-forward", "ghn2", "directions: forward", "47.0 ± 1.4", "-8.00 [-20.71, 4.71]", 2],
        ["mlp", "ghn2", "encoder: mlp", "25.0", "-30.00 [-30.00, -30.00]", 0],
    ]
    timed = replace(setup, evaluate=setup.evaluate.model_copy(update={"seconds": True}))
    for seed, networks in ((0, [4.0, 8.0]), (1, [16.0])):
        kept = setup.folder.with_name(f"train-ghn2-{seed}")
        kept.mkdir(parents=True)
        pd.DataFrame({"networks_per_second": networks}).to_csv(kept / "throughput.csv")
    seconds = ablations.ablation_table(timed, tests, costs)["seconds a step"]
    assert seconds["ghn2"] == 0.25 and math.isnan(seconds["ghn2-forward"])


def test_a_profile_without_such_rows_has_no_table(untrained):
    assert ablations.ablation_table(replace(untrained, train=params().train), [], pd.DataFrame()).empty


def test_gradient_norms_are_compared_by_seed(setup):
    names = {"ghn2-m1": 5.0, "ghn2-m8": 2.0}
    for name, norm in names.items():
        for seed in setup.train.seeds:
            Path("models", f"{name}-{seed}").mkdir(parents=True, exist_ok=True)
            pd.DataFrame({"step": [1, 2], "grad_norm": norm + seed}).to_csv(
                f"models/{name}-{seed}/history.csv", index=False
            )
    assert ablations.claims_of_gradients(setup) == {}
    own = setup.train.variants["ghn2"]
    variants = {name: own.model_copy(update={"meta_batch": int(name[-1])}) for name in names}
    train = setup.train.model_copy(update={"variants": variants})
    found = ablations.claims_of_gradients(replace(setup, train=train))
    assert {key: ours[:4] for key, ours in found.items()} == {
        "gradient-norm/ghn2-m1 over ghn2-m8": (3.0, 3.0, 3.0, None)
    }


def test_panels_show_networks_with_and_without_batch_norm_apart():
    rows = pd.concat([rows_of({"ghn2": [50.0, 60.0, 70.0, 80.0], "short": [1.0] * 4, "random": [9.0]}), rows_of({"ghn2": [40.0, 44.0]}, "deep"),
                      rows_of({"ghn2": [10.0, 12.0]}, "bnfree", batch_norm=False), rows_of({"ghn2": [99.0]}, "predefined")], ignore_index=True)  # fmt: skip
    found = Evaluation(rows, ["ghn2", "short"], ["ghn2"], "ghn2")
    width, depth, nodes, bare = network_sizes.size_panels(found)
    assert [len(p.rows) for p in (width, depth, nodes, bare)] == [5, 7, 7, 2]
    assert set(depth.rows["method"]) == {"ghn2", "random"} and "predefined" not in set(nodes.rows["split"])
    assert (nodes.rows.groupby("fifth")["nodes"].nunique() <= 2).all()
    assert network_sizes.size_correlations(found)["depth without batch norm: cells"] == pytest.approx(1)
    assert network_sizes.norm_gap(found).value == pytest.approx(np.mean([50, 60, 70, 80, 40, 44]) - 11)


def test_torchvision_is_left_out_unless_it_is_asked_for(setup):
    rows = evaluate_torchvision_networks(setup)
    assert rows.empty and torchvision_table(rows, ["mlp", "ghn2"]).isna().all().all()
    assert means_by_split(rows) == {}
    known = pd.DataFrame({"network": ["resnet50", "alexnet", "swin_v2_t"], "accuracy": [4.0, 2.0, math.nan], "method": "ghn2",
                          "split": ["PyTorch split", "PyTorch split", "newer"]})  # fmt: skip
    table = torchvision_table(known, ["mlp", "ghn2"])
    assert (
        table.loc["ghn2"].to_dict() == {"PyTorch split": "3.00 ± 1.00 (n = 2)", "ResNet-50": 4.0}
        and table.loc["mlp"].isna().all()
    )


def test_predicted_weights_are_rounded_to_few_bits_beside_the_same_networks_in_float(setup, splits, evaluation):
    section = setup.evaluate.model_copy(update={"bits": (8, 2), "quantised_networks": 2})
    own = replace(setup, evaluate=section)
    vars(own).update(images=setup.images, hypernetworks=setup.hypernetworks)
    found = evaluate_quantised(own, splits["test"], evaluation)
    count = min(2, len(splits["test"]))
    assert found.table.columns.tolist() == ["float", "8 bits", "2 bits"]
    assert found.table.index.tolist() == ["mlp", "ghn2"]
    assert {len(rows) for _, rows in found.rows.groupby(["method", "weights", "seed"])} == {count}
    rows = found.rows.set_index(["method", "weights", "seed", "index"])["accuracy"]
    images, ghn = setup.images.test, setup.hypernetworks["ghn2"][1]
    for weights, bits in ("float", None), ("8 bits", 8), ("2 bits", 2):
        expected = predicted_accuracies(splits["test"][0], ghn, images, section.batch_size, bits=bits)["accuracy"]
        assert rows["ghn2", weights, 1, 0] == expected
    assert found.metrics["2 bits"]["mlp"]["test"]["n"] == count
    own = replace(setup, evaluate=setup.evaluate.model_copy(update={"bits": ()}))
    assert evaluate_quantised(own, splits["test"], evaluation).metrics == {}


def test_networks_of_ones_own_are_evaluated_with_every_hypernetwork(setup, evaluation):
    unasked = evaluate_own_networks(setup, evaluation)
    assert unasked.rows.empty
    shared = {"mlp": setup.train.variants["mlp"], "ghn2": TrainVariant.of({"encoder": "gated_gnn", "extra_share": 0.5})}
    own = replace(
        setup,
        train=setup.train.model_copy(update={"variants": shared}),
        deepnets=setup.deepnets.model_copy(update={"extra": (f"{HANDWRITTEN}:resnet", f"{HANDWRITTEN}:vit")}),
        evaluate=setup.evaluate.model_copy(update={"unseen": (f"{HANDWRITTEN}:resnet_deep",)}),
    )
    vars(own).update(images=setup.images, hypernetworks=setup.hypernetworks)
    assert own.train.plain == ["mlp"]
    found = evaluate_own_networks(own, evaluation)
    groups = {"resnet": "trained on", "vit": "trained on", "resnet_deep": "unseen"}
    assert dict(zip(found.rows["network"], found.rows["group"])) == groups
    ghn = setup.hypernetworks["ghn2"][setup.train.seeds[1]]
    (network,) = own_networks(own.evaluate.unseen, len(setup.images.classes), 8)
    rows = found.rows[(found.rows["method"] == "ghn2") & (found.rows["network"] == "resnet_deep")]
    scores = predicted_accuracies(network, ghn, setup.images.test, setup.evaluate.batch_size)
    assert (
        rows["accuracy"].iloc[1] == scores["accuracy"] and found.means["ghn2"]["resnet_deep"] == rows["accuracy"].mean()
    )
    assert list(found.table) == [*groups, "mean, trained on", "mean, unseen", "mean, test"]
    assert found.table.loc["ghn2", "mean, test"] == with_deviation(found.test["ghn2"])
    means = found.rows[found.rows["group"] == "trained on"].groupby(["method", "seed"])["accuracy"].mean()
    assert found.table.loc["mlp", "mean, trained on"] == with_deviation(means["mlp"])
