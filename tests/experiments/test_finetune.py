"""The report on fine-tuning: budgets, what is tuned, trained and compared, on few small networks."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats
from shared import ROOT, digits, pool, tiny

from ghnlib.data.sources import ImageSplits
from ghnlib.experiments.families import class_layers
from ghnlib.experiments.finetune import resnet50, tuning
from ghnlib.experiments.finetune.tuning import Budgets, FineTuned, wins
from ghnlib.experiments.setup import Setup
from ghnlib.measuring.accuracy import estimate_batch_norm
from ghnlib.params import FineTune
from ghnlib.params_file import read_merged, validate
from ghnlib.reporting.statistics import with_deviation
from ghnlib.training.initialization import Sources
from ghnlib.training.networks import EVALUATION_BATCH, Accuracy, Run, TrainingRecipe, initial_network


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny profile with few images, two untrained hypernetworks of each kind, a rate that diverges in its grid."""
    raw = read_merged(ROOT / "params.yaml", ROOT / "profiles" / "tiny.yaml")
    settings = {"batch_size": 10, "lrs": {"sgd": [1e20, 0.01], "adamw": []}, "budgets": [0.1, 1], "variants": ["ghn3"],
                "families": ["small-resnet", "resnet49"], "networks": 2, "seeds": [0, 5], "resnet50_steps": 20, "resnet50_variants": ["ghn2"],
                "resnet50_lrs": {"sgd": [1e20, 0.01], "adam": [1e-3]}}  # fmt: skip
    read = validate(raw)
    setup = Setup("finetune", read.profile, read.seed, tmp_path_factory.mktemp("finetune"), metrics=read.metrics,
                  data=read.data, deepnets=read.deepnets, train=read.train.model_copy(update={"seeds": (0, 7)}), finetune=FineTune.of({**raw["finetune"], **settings}))  # fmt: skip
    images = digits(image_size=16)
    vars(setup)["images"] = ImageSplits(*(part.few_shot(6, seed=0) for part in (images.train, images.val, images.test)))
    vars(setup)["hypernetworks"] = {
        "ghn2": {0: tiny("gated_gnn"), 7: tiny("gated_gnn")},
        "ghn3": {0: tiny(), 7: other()},
    }
    return setup


def other():
    """A hypernetwork with other parameters."""
    ghn = tiny()
    for value in ghn.parameters():
        value.data *= 0.5
    return ghn


@pytest.fixture(scope="module")
def networks(setup):
    return tuning.choose_networks(setup)


@pytest.fixture(scope="module")
def tuned(setup, networks):
    return tuning.tune_settings(setup, networks)


@pytest.fixture(scope="module")
def trained(setup, networks, tuned):
    return tuning.train_networks(setup, networks, tuned)


def test_budgets_are_named_and_compared_with_those_of_the_papers():
    budgets = Budgets((8, 80, 160), 80)
    assert list(budgets.moments.values()) == ["0 steps", "4 steps", "8 steps", "1 epoch", "2 epochs"]
    assert (budgets.tenth, budgets.one, budgets.in_epochs(40)) == ("8 steps", "1 epoch", "40 (0.5 epochs)")
    assert [budgets.checkpoints(n) for n in budgets.steps] == [[0, 4, 8], [80], [80, 160]]
    assert tuning.papers_of(budgets) == ["finetune/tenth-epoch", "finetune/epoch"]


def test_without_an_epoch_the_longest_budget_stands_in_for_it():
    budgets = Budgets((2, 30), 80)
    assert list(budgets.moments.values()) == ["0 steps", "2 steps", "30 steps"]
    assert (budgets.tenth, budgets.one, tuning.papers_of(budgets)) == (None, "30 steps", [])


def test_networks_are_the_first_and_those_of_torchvision_that_can_be_predicted(setup, networks):
    assert networks.chosen["DeepNets"] == [setup.split("test")[i] for i in range(2)]
    assert networks.tuning["DeepNets"] == [setup.split("val")[0]]
    assert list(networks.chosen) == ["DeepNets", "small-resnet"] and len(networks.chosen["small-resnet"]) == 1
    assert list(networks.refused) == ["resnet49"] and "resnet49" in networks.refused["resnet49"]
    assert class_layers(networks.chosen["small-resnet"][0].graph) == ["fc.weight", "fc.bias"]


def test_each_side_is_tuned_for_each_budget(setup, tuned):
    budgets = Budgets.of(setup)
    assert list(tuned) == [(family, steps) for family in ("DeepNets", "small-resnet") for steps in (1, 6)]
    assert list(tuned["DeepNets", 6]) == ["ghn3", "orthogonal", "random"]
    assert tuned["DeepNets", 1]["random"] == {"optimizer": "sgd", "lr": 0.01, "weight_decay": 3e-4}
    table = tuning.settings_table(tuned, budgets, setup.finetune.lrs)
    assert table.loc["DeepNets, 1 epoch", "random"] == "sgd, lr 0.01 (end of grid), weight decay 0.0003"


def test_each_network_is_trained_from_each_side_at_each_budget(trained):
    assert trained.moments == ["0 steps", "1 steps", "1 epoch"]
    assert trained.per_network.groupby(["initialisation", "moment"]).size().eq(2).all()
    assert trained.rows.groupby("training")["seed"].unique().map(list).to_dict() == {0: [0], 1: [5]}
    assert set(trained.longest["step"]) == set(range(1, 7)) and len(trained.losses) == 3 * 2 * 6
    assert trained.by_family().shape == (3, 3) and trained.by_family().loc[("small-resnet", "ghn3")].notna().all()
    rows = trained.per_network.loc["ghn3", "1 epoch"]
    assert trained.means()["ghn3"]["1 epoch"]["mean"] == pytest.approx(rows.mean())


def test_the_runs_of_a_seed_start_from_the_predictions_of_its_training(setup, networks, trained):
    start = trained.rows[(trained.rows["moment"] == "0 steps") & (trained.rows["initialisation"] == "ghn3")]
    expected = [
        Accuracy(setup.images.test)(trained_net(ghn, network, setup, seed))["accuracy"]
        for network in networks.chosen["DeepNets"]
        for seed, ghn in zip((0, 5), setup.hypernetworks["ghn3"].values())
    ]
    found = start[start["family"] == "DeepNets"].sort_values(["network", "seed"])["accuracy"]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def trained_net(ghn, network, setup, seed):
    sources = Sources(parameters=ghn.predict(network.graph))
    net = initial_network(Run(network, TrainingRecipe(1, 0.1), seed, "ghn-noise", sources))
    estimate_batch_norm(net, setup.images.train, 1, EVALUATION_BATCH, seed)
    return net


def test_tables_tell_the_deviation_over_trainings(trained):
    table = tuning.accuracy_table(trained)
    ends = trained.deepnets[trained.deepnets["moment"] == "1 epoch"]
    ends = ends.groupby(["initialisation", "training"])["accuracy"].mean()
    assert table.shape == (3, 3) and table.loc["ghn3", "1 epoch"] == with_deviation(ends["ghn3"])
    assert tuning.family_table(trained).shape == (3, 3)
    assert {lead.trainings for lead in trained.leads("ghn3").values()} == {2}


def test_another_metric_takes_the_place_of_accuracy(setup, trained):
    for metric in setup.metrics:
        found = trained.scored_by(metric)
        rows = trained.deepnets[
            (trained.deepnets["moment"] == "1 epoch") & (trained.deepnets["initialisation"] == "ghn3")
        ]
        assert found.means()["ghn3"]["1 epoch"]["mean"] == pytest.approx(rows[metric].mean())
    assert tuning.accuracy_table(found).shape == (3, 3) and not found.failed


def test_a_metric_that_no_run_has_counts_as_0():
    found = trainings(rows_of(ghn3={"1 steps": [math.nan, math.nan]})).scored_by("auc")
    assert found.means()["ghn3"]["1 steps"]["mean"] == 0 and found.failed == trainings(found.rows).failed


def trainings(rows, budgets=None, **values):
    complete = {"family": "DeepNets", "error": "", "seed": 0, "training": 0, "step": 1, "budget": 1, "loss": 1.0}
    return FineTuned(rows.assign(**{**complete, **values}), budgets or Budgets((1, 10), 10), ("ghn2", "ghn3"), 2)


def test_claims_are_leads_over_the_same_networks():
    moments = {"0 steps": [10, 20, 30], "1 steps": [50, 60, 70], "1 epoch": [80, 80, 80]}
    found = trainings(
        rows_of(random=moments, ghn3={"0 steps": [40, 50, 60], "1 steps": [40, 70, 73], "1 epoch": [79, 85, 87]})
    )
    claims = tuning.claims_of_leads(found) | tuning.claims_of_wins(found)
    assert {name: (round(claim.value, 6), claim.n) for name, claim in claims.items()} == {
        "few-steps": (6.5, 2), "one-epoch": (6, 2), "full-training": (3.666667, 3), "wins-after-epoch": (0.166667, 3),
    }  # fmt: skip
    assert claims["few-steps"].low < 0 < claims["few-steps"].high and found.leads("ghn3")["0 steps"].value == 30
    assert all(claim.verdict == "not decided (one training)" for claim in claims.values())


def test_each_side_has_its_own_best_networks():
    found = trainings(rows_of(random={"0 steps": [10, 20, 30]}, ghn3={"0 steps": [60, 50, 40]}))
    assert found.scores(top=True)["random", "0 steps"].to_dict() == {1: 20.5, 2: 30.5}
    assert found.scores(top=True)["ghn3", "0 steps"].to_dict() == {0: 60.5, 1: 50.5}
    assert tuning.accuracy_table(found, top=True)["0 steps"].to_dict() == {"random": "25.5", "ghn3": "55.5"}
    assert found.leads("ghn3", top=True)["0 steps"].value == 30 and found.leads("ghn3")["0 steps"].value == 30


def test_trainings_are_compared_by_seed_and_their_spread_widens_the_interval():
    rows = rows_of(random={"0 steps": [10, 20, 30]}, ghn3={"0 steps": [12, 22, 32]})
    one = trainings(rows)
    two = pd.concat(
        [one.rows, one.rows.assign(training=1, accuracy=rows["accuracy"] + 6 * (rows["initialisation"] == "ghn3"))]
    )
    lead = replace(one, rows=two).leads("ghn3")["0 steps"]
    half = stats.t.ppf(0.975, 1) * 3  # leads of 2 and 8, none of it over networks
    assert lead == (5, pytest.approx(5 - half), pytest.approx(5 + half), 3, 2)


def test_the_interval_of_a_share_ends_where_shares_do():
    rows = rows_of(random={"1 epoch": [50, 50, 50]}, ghn3={"1 epoch": [60, 60, 60]})
    behind = rows.assign(training=1, accuracy=rows["accuracy"].where(rows["initialisation"] == "random", 40))
    found = trainings(rows)
    share = tuning.claims_of_wins(replace(found, rows=pd.concat([found.rows, found.rows.assign(**behind)])))
    assert share["wins-after-epoch"][:3] == (0, -0.5, 0.5)


def test_without_an_epoch_or_the_hypernetwork_there_is_no_claim_of_it():
    rows = rows_of(random={"1 steps": [1], "9 steps": [2]}, ghn3={"1 steps": [3], "9 steps": [5]})
    found = trainings(rows, Budgets((1, 9), 10))
    assert {name: claim.value for name, claim in tuning.claims_of_leads(found).items()} == {
        "few-steps": 2, "full-training": 3,
    }  # fmt: skip
    assert not tuning.claims_of_wins(found)
    assert list(tuning.wins_table(found, "ghn3").columns.levels[0]) == ["same budget", "random after 9 steps"]
    others = replace(found, variants=("ghn2",))
    assert not tuning.claims_of_leads(others) and not tuning.claims_of_wins(others)


def test_what_diverged_counts_as_0_and_what_failed_is_left_out():
    rows = rows_of(random={"1 steps": [50, 60]}, ghn3={"1 steps": [80, math.nan]})
    failed = rows_of(ghn3={"1 steps": [math.nan]}).assign(network=2)
    found = trainings(pd.concat([rows, failed]), error=[""] * len(rows) + ["ValueError: too large"] * len(failed))
    assert found.means()["ghn3"]["1 steps"]["mean"] == pytest.approx((80.5 + 0) / 2)
    assert len(found.failed) == 4 and "too large" in found.failed[-1]


def test_published_wins_stand_beside_budgets_like_theirs():
    moments = {"0 steps": [10], "1 steps": [50], "1 epoch": [80]}
    table = tuning.wins_table(trainings(rows_of(random=moments, ghn3=moments)), "ghn3")
    assert table.iloc[:, -1].tolist() == ["5%, 1.6, -16.4", "14%, 11.0, -12.0", "74%, 12.3, -4.2"]
    assert table["random after 1 epoch", "mean loss"].tolist()[:2] == ["-70.0", "-30.0"]


def test_wins_are_counted_by_what_networks_are_made_of():
    networks = (*pool(size=6), *pool("bnfree", 2))
    moments = {"0 steps": [10] * 8}
    found = trainings(rows_of(random=moments, ghn3={"0 steps": [20, 20, 0, 20, 20, 20, 0, 0]}))
    table = tuning.wins_by_kind(found, networks, "ghn3")["0 steps"]
    without = [i for i, network in enumerate(networks) if not any(node.op == "bn" for node in network.graph.nodes)]
    assert table[f"no batch norm (of {len(without)})"] == f"{len(set(without) & {0, 1, 3, 4, 5})}.0"
    assert len(table) > 1 and "(of 0)" not in " ".join(table.index)


def test_the_early_loss_is_compared_over_networks():
    moments = {"1 epoch": [10, 10]}
    found = trainings(rows_of(random=moments, ghn3=moments), budget=10, step=3)
    rows = found.rows.assign(loss=[2.0, 2.0, 2.5, 2.5, 1.0, 1.0, 1.0, 1.0])
    steps, lower = replace(found, rows=rows).early_loss("ghn3")
    assert (steps, lower.value, lower.n) == (3, 1.25, 2)


def rows_of(**accuracies):
    rows = [
        {"initialisation": name, "moment": moment, "network": network, "seed": seed, "accuracy": value + seed}
        for name, moments in accuracies.items() for moment, values in moments.items()
        for network, value in enumerate(values) for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_wins_gains_and_losses():
    results = rows_of(
        random={"early": [10, 20, 30], "late": [50, 60, 70]}, ghn={"early": [40, 22, 29], "late": [40, 60, 66]}
    )
    early, late = wins(results, "ghn").loc["early"], wins(results, "ghn").loc["late"]
    assert early.to_dict() == {"networks": 3, "wins": 2, "mean gain": 16, "mean loss": -1, "largest loss": -1}
    assert (late["wins"], late["mean loss"], late["largest loss"]) == (0, -7, -10) and math.isnan(late["mean gain"])
    assert wins(results, "ghn", against="late").loc["early", "mean loss"] == pytest.approx((-10 - 38 - 41) / 3)


@pytest.mark.parametrize(
    ("ghn", "step"), [([3, 2, 1], None), ([5, 5, 5], 0), ([3, 3, 3], 20), ([3, 2.9, math.nan], 30), ([5, 2, 9], 30)]
)
def test_crossover_is_where_random_initialisation_stays_ahead(ghn, step):
    losses = {"random": [4, 3, 2], "ghn": ghn}
    rows = [
        {"initialisation": n, "step": s, "loss": v} for n, all_ in losses.items() for s, v in zip((10, 20, 30), all_)
    ]
    assert resnet50.crossover(pd.DataFrame(rows), "ghn") == step
    scores = [{**row, "accuracy": 100 - row["loss"], "loss": 1.0} for row in rows]
    unseen = [{"initialisation": n, "step": 15, "accuracy": math.nan, "loss": 1.0} for n in losses]
    assert resnet50.crossover(pd.DataFrame(scores + unseen), "ghn", "accuracy") == step


@pytest.mark.parametrize(("name", "step"), [("ghn", 0), ("random", None)])
def test_a_side_that_diverged_in_all_runs_is_not_ahead(name, step):
    losses = {"random": 4.0, "ghn": 5.0} | {name: math.nan}
    rows = [{"initialisation": n, "step": s, "loss": v} for n, v in losses.items() for s in (10, 20)]
    assert resnet50.crossover(pd.DataFrame(rows), "ghn") == step


def test_a_crossover_is_told_in_epochs():
    budgets = Budgets((10,), 20)
    words = [resnet50.crossover_in_words(step, budgets) for step in (None, 0, 30)]
    assert words == ["ahead to the end", "never ahead", "ahead until step 30 (1.5 epochs)"]


def test_resnet50_is_compared_by_optimizer_at_its_best_rate(setup, monkeypatch):
    monkeypatch.setattr(resnet50, "NamedNetwork", lambda classes, side: pool(input_size=16)[0])
    own = replace(setup, finetune=setup.finetune.model_copy(update={"weight_decays": (1e30, 3e-4)}))
    vars(own).update({name: vars(setup)[name] for name in ("images", "hypernetworks")})
    found = resnet50.compare_on_resnet50(own)
    assert set(found["weight_decay"]) == {3e-4}, "the other diverges"
    ends = found[found["step"] == 20].set_index(["initialisation", "optimizer", "seed"])["lr"]
    assert ends.to_dict() == {
        (side, optimizer, seed): {"sgd": 0.01, "adam": 1e-3}[optimizer]
        for side in ("random", "ghn2") for optimizer in ("sgd", "adam") for seed in (0, 5)
    }  # fmt: skip
    assert found["accuracy"].notna().all() and len(found) == 2 * 4 * 11
    assert found.loc[found["step"] > 0, "loss"].notna().all()
    crossed = resnet50.crossovers(found, ["ghn2"], "accuracy")
    assert list(crossed) == ["ghn2, sgd", "ghn2, adam"] and {len(steps) for steps in crossed.values()} == {2}
    second = found[(found["optimizer"] == "adam") & (found["seed"] == 5)]
    assert crossed["ghn2, adam"][1] == resnet50.crossover(second, "ghn2", "accuracy")


def test_without_steps_of_resnet50_nothing_is_claimed_of_it(setup):
    without = replace(setup, finetune=setup.finetune.model_copy(update={"resnet50_steps": 0}))
    vars(without)["images"] = setup.images
    assert (
        resnet50.compare_on_resnet50(without).empty
        and resnet50.crossovers(resnet50.compare_on_resnet50(without), ["ghn2"], "loss") == {}
    )


def test_a_crossover_that_never_came_is_infinitely_late():
    claims = resnet50.claims_of_resnet50({"ghn1, sgd": [5, 5], "ghn2, sgd": [4, None], "ghn2, adam": [7, 9]})
    assert {name: claim.value for name, claim in claims.items()} == {
        "resnet50-crossover/sgd": math.inf, "resnet50-crossover/adam": 8,
    }  # fmt: skip
    assert claims["resnet50-crossover/sgd"].verdict == "not decided (no interval)"
    assert claims["resnet50-crossover/adam"].low == pytest.approx(8 - stats.t.ppf(0.975, 1))
