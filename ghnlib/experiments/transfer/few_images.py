"""The report on transfer of networks to other classes or another dataset with few images (GHN-orth, GHN-3 Table 7)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan

import numpy as np
import pandas as pd
import torch
from torch import nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import ImageSet
from ghnlib.data.sources import ImageSplits
from ghnlib.experiments.families import DEEPNETS, TrainedFamilies
from ghnlib.experiments.setup import Setup
from ghnlib.experiments.transfer.pretraining import Family, Learnt, Source, processings, runs_from
from ghnlib.measuring.costs import flops, step_flops
from ghnlib.measuring.kept import rows_kept
from ghnlib.reporting.statistics import (
    Measured,
    claims_over_trainings,
    finite,
    mean_and_error,
    paired_interval,
    rate_in_words,
    tables_over_trainings,
)
from ghnlib.training.networks import Accuracy, Run, best_settings, grid_of, initial_network, run_all, tune

KINDS = {"convnext": "new-classes-convnext", "swin": "new-classes-swin"}
"""Part of the name of torchvision's networks -> the claim that predictions help them (GHN-3 Table 7)."""


@dataclass(frozen=True)
class Transferred(TrainedFamilies):
    """Networks after training on few images of each target. ``rows``: also ``dataset``, the target; ``tuned``: (target,
    family) -> initialisation -> its setting, see ``tune``, and its ``Processing``; ``name``: the hypernetwork's
    variant; ``lrs``: the rates that were tried, by optimiser."""

    tuned: Mapping[tuple[str, str], Mapping[str, Mapping[str, object]]]
    name: str
    lrs: Mapping[str, Sequence[float]]

    @property
    def steps(self) -> int:
        """Of each training."""
        return int(self.rows["budget"].iloc[0])

    @property
    def starts(self) -> list[str]:
        """Initialisations, in the order of tables."""
        return list(self.deepnets["initialisation"].unique())

    @cached_property
    def per_network(self) -> pd.Series:
        """Accuracy (percent) of DeepNets' architectures, mean over seeds, by dataset, initialisation, step, network."""
        by = ["dataset", "initialisation", "step", "network"]
        return self.deepnets.groupby(by, sort=False)["accuracy"].mean()

    @cached_property
    def at_end(self) -> pd.DataFrame:
        """The same at the end: rows are datasets and networks, columns initialisations."""
        return self.per_network.xs(self.steps, level="step").unstack("initialisation")

    def table(self, dataset: str) -> pd.DataFrame:
        """One row an initialisation: accuracy on a target by step, mean over networks ± deviation over trainings, and
        what was tuned."""
        means = [one.per_network.loc[dataset].groupby(level=["initialisation", "step"], sort=False).mean()
                 for one in self.by_training]  # fmt: skip
        table = tables_over_trainings([mean.unstack(sort=False).add_suffix(" steps") for mean in means])
        table["networks"] = self.at_end.loc[dataset].count()
        settings = {start: {**own, "lr": rate_in_words(own["lr"], self.lrs[own["optimizer"]])}
                    for start, own in self.tuned[dataset, DEEPNETS].items()}  # fmt: skip
        words = {start: ", ".join(f"{key} {value}" for key, value in own.items()) for start, own in settings.items()}
        return table.assign(tuned=pd.Series(words)).rename_axis(index=None, columns=None)

    @cached_property
    def leads(self) -> dict[str, dict[str, Measured]]:
        """Target -> "A - B" -> points by which start A is ahead of B at the end, over networks and trainings."""
        each = [one._leads for one in self.by_training]
        return {dataset: claims_over_trainings([leads[dataset] for leads in each]) for dataset in each[0]}

    @property
    def _leads(self) -> dict[str, dict[str, Measured]]:
        pairs = (self.name, "random"), (self.name, "orthogonal"), (f"{self.name}-orth", self.name)
        return self._each(lambda rows: {f"{a} - {b}": paired_interval(rows[a], rows[b]) for a, b in pairs})

    @cached_property
    def control(self) -> dict[str, Measured]:
        """Target -> points by which post-processing helps networks that were trained on the source; none without."""
        if "trained" not in self.at_end:
            return {}
        return self._each(lambda rows: paired_interval(rows["trained-orth"], rows["trained"]))

    @property
    def oracle(self) -> dict[str, dict[str, Measured]]:
        """Target -> "trained - B" -> points by which networks trained on the source are ahead of the best other start
        B, on the same architectures; none without."""
        return self._each(_oracle_lead) if "trained" in self.at_end else {}

    def _each(self, measure: Callable[[pd.DataFrame], object]) -> dict[str, object]:
        return {dataset: measure(rows) for dataset, rows in self.at_end.groupby(level="dataset", sort=False)}

    @property
    def points(self) -> pd.DataFrame:
        """All these leads in words: one row a pair of starts, one column a target."""
        found = {}
        for dataset, leads in self.leads.items():
            found[dataset] = {**leads, **self.oracle.get(dataset, {})}
            if dataset in self.control:
                found[dataset]["trained-orth - trained (control)"] = self.control[dataset]
        return pd.DataFrame({dataset: pd.Series(leads).map(str) for dataset, leads in found.items()})

    @property
    def claims(self) -> dict[str, Measured]:
        """Of GHN-3 Table 7 (for a GHN-3), GHN-orth Table 1 and its control."""
        found = {}
        for dataset, leads in self.leads.items():
            if self.name == "ghn3":
                found[f"new-classes/{dataset}"] = leads["ghn3 - random"]
            found[f"orth/{dataset}"] = leads[f"{self.name}-orth - {self.name}"]
        for dataset in self.control:
            rows = self.at_end.loc[dataset]
            found[f"orth-control/{dataset}"] = paired_interval(rows["trained"], rows["trained-orth"])
        return finite(found)

    @property
    def _family_runs(self) -> pd.core.groupby.SeriesGroupBy:
        ends = self.counted[(self.counted["family"] != DEEPNETS) & (self.counted["step"] == self.steps)]
        return ends.groupby(["dataset", "family", "initialisation"], sort=False)["accuracy"]

    @cached_property
    def families(self) -> pd.DataFrame:
        """Accuracy (percent) of torchvision's networks at the end, mean over seeds: rows are datasets and families,
        columns initialisations."""
        return self._family_runs.mean().unstack()

    def family_table(self, dataset: str) -> pd.DataFrame:
        """The same on a target, mean ± deviation over trainings, a row a family, and the points by which
        post-processing helps trained networks."""
        table = tables_over_trainings([one.families.loc[dataset] for one in self.by_training])
        runs, means = self._family_runs.agg(tuple).unstack().loc[dataset], self.families.loc[dataset]
        if "trained" in means:
            words = (means["trained-orth"] - means["trained"]).map("{:+.3g}".format)
            alike = runs["trained-orth"] == runs["trained"]
            table = table.assign(**{"trained-orth - trained": words.mask(alike, "equal throughout")})
        return table.rename_axis(index=None, columns=None)

    def families_won(self, start: str) -> int:
        """For how many networks and targets the prediction is ahead of an initialisation."""
        return int((self.families[self.name] > self.families[start]).sum()) if len(self.families) else 0

    @property
    def family_claims(self) -> dict[str, Measured]:
        """Of GHN-3 Table 7, ConvNeXt and Swin; one network each, so that the interval is over trainings alone."""
        return claims_over_trainings([one._family_claims for one in self.by_training])

    @property
    def _family_claims(self) -> dict[str, Measured]:
        found = {}
        for (dataset, family), row in self.families.iterrows() if self.name == "ghn3" else ():
            lead = float(row["ghn3"] - row["random"])
            kinds = [claim for kind, claim in KINDS.items() if kind in family and not isnan(lead)]
            found |= {f"{claim}/{dataset}, {family}": Measured(lead) for claim in kinds}
        return found

    @property
    def metrics(self) -> dict[str, object]:
        """For ``Setup.publish``: accuracies by target, initialisation and step, leads, settings, families, failures."""
        accuracy: dict[str, dict[str, dict[str, object]]] = {}
        for (dataset, start, step), scores in self.per_network.groupby(level=[0, 1, 2], sort=False):
            accuracy.setdefault(dataset, {}).setdefault(start, {})[f"{step} steps"] = mean_and_error(scores)
        return {
            "accuracy": accuracy,
            "paired": self.leads,
            "tuned": {dataset: self.tuned[dataset, DEEPNETS] for dataset in accuracy},
            "control": self.control,
            "families": {dataset: self.families.loc[dataset].T.to_dict() for dataset in self.families.index.unique(0)},
            "diverged": len(self.failed),
        }


def _oracle_lead(rows: pd.DataFrame) -> dict[str, Measured]:
    both = rows.dropna(subset="trained")
    best = both.drop(columns=["trained", "trained-orth"]).mean().idxmax()
    return {f"trained - {best}, the best other start": paired_interval(both["trained"], both[best])}


def transfer_networks(setup: Setup, source: Source, families: Mapping[str, Family]) -> Transferred:
    """Train each family on few images of each target from each start, and measure accuracy on its test images after a
    tenth and a half of the steps and at the end.

    On validation images, from the first training of the hypernetwork: optimiser, rate and weight decay of each start
    are tuned, then with these the post-processing.
    """
    parts, tuned = [], {}
    for dataset, target in source.targets.items():
        few = target.train.few_shot(setup.transfer.per_class, setup.seed)
        for name, family in families.items():
            rows, tuned[dataset, name] = _transfer_family(setup, source, family, target, few)
            parts.append(rows.assign(dataset=dataset, family=name))
            print(f"{dataset}, {name}: transferred", flush=True)
    return Transferred(pd.concat(parts), tuned, source.name, setup.transfer.lrs)


def _transfer_family(
    setup: Setup, source: Source, family: Family, target: ImageSplits, few: ImageSet
) -> tuple[pd.DataFrame, dict[str, dict[str, object]]]:
    transfer, kept = setup.transfer, setup.kept
    grid = grid_of(transfer.lrs, transfer.weight_decays)
    from_first = lambda *tuned: runs_from(setup, source, family.tuning, [setup.seed], target, *tuned)
    tuned = tune(from_first(), grid, few, target.val, **kept)
    ways = [(how, from_first(tuned, dict.fromkeys(tuned, how))) for how in processings(setup)]
    tried = [replace(run, labels={**run.labels, **how})
             for how, runs in ways for run in runs if run.labels["initialisation"].endswith("-orth")]  # fmt: skip
    scores = run_all(tried, few, Accuracy(target.val), **kept)
    processing = best_settings(scores, "initialisation", ["orth_from", "noise"])
    runs = runs_from(setup, source, family.test, transfer.seeds, target, tuned, processing)
    measure, checkpoints = Accuracy(target.test, metrics=setup.metrics[1:]), (transfer.steps // 10, transfer.steps // 2)
    rows = run_all(runs, few, measure, checkpoints, **kept)
    return rows, {name: {**setting, **processing.get(name, {})} for name, setting in tuned.items()}


BINS = np.linspace(-1, 1, 41)
"""Bounds of the bins in which correlations are counted."""


def correlations_by_start(setup: Setup, source: Source, learnt: Learnt) -> pd.DataFrame:
    """``channel_correlations`` of each network from each start before it is fine-tuned (GHN-orth Fig. 2),
    post-processed by the first of ``processings``: what is tuned may be another on another machine. Predicted
    classification layers change none. Rows ``initialisation``, ``training``, ``network``, ``layer``, ``mean`` (of
    absolute values), ``deviation``, ``counts`` (in ``BINS``)."""
    runs = runs_from(setup, source, learnt, setup.transfer.seeds[: len(source.trainings)])
    tasks = [(run.labels, (run,)) for run in runs]
    return rows_kept(_correlations, tasks, (), **setup.kept).dropna(subset="layer")


def _correlations(run: Run) -> list[dict[str, object]]:
    found = channel_correlations(initial_network(run))
    return [
        {"layer": layer, "mean": float(np.abs(values).mean()), "deviation": float(values.std()),
         "counts": np.histogram(values, BINS)[0]} for layer, values in found.items()
    ]  # fmt: skip


def channel_correlations(net: nn.Module) -> dict[int, np.ndarray]:
    """Correlations, -1 to 1, between different output channels of each convolution, by layer (GHN-orth Fig. 2).

    The channels of a weight are the rows of its matrix (out, in * h * w). Convolutions with fewer than two, or with
    channels of a single value, have no correlation and are left out.
    """
    found = {}
    for layer, weight in enumerate(m.weight.detach() for m in net.modules() if isinstance(m, nn.Conv2d)):
        if len(weight) > 1 and weight[0].numel() > 1:
            different = ~torch.eye(len(weight), dtype=torch.bool)
            values = torch.corrcoef(weight.flatten(1))[different]
            found[layer] = values[values.isfinite()].clamp(-1, 1).numpy()
    return {layer: values for layer, values in found.items() if len(values)}


def deviation_table(correlations: pd.DataFrame) -> pd.DataFrame:
    """One row an initialisation: deviation and mean absolute value of correlations, means over convolutions of all
    networks, ± deviation over trainings."""
    each = [rows.groupby("initialisation", sort=False)[["deviation", "mean"]].mean()
            for _, rows in correlations.groupby("training")]  # fmt: skip
    titles = {"deviation": "deviation of correlations", "mean": "mean |correlation|"}
    return tables_over_trainings(each, 3).rename(columns=titles).rename_axis(index=None)


def distribution(correlations: pd.DataFrame) -> pd.DataFrame:
    """Density of correlations, over convolutions, networks and trainings: rows are middles of ``BINS``, columns
    initialisations."""
    counts = correlations.groupby("initialisation", sort=False)["counts"].sum()
    shares = {start: of / of.sum() / np.diff(BINS) for start, of in counts.items()}
    return pd.DataFrame(shares, index=(BINS[1:] + BINS[:-1]) / 2)


def claims_of_correlations(correlations: pd.DataFrame, name: str) -> dict[str, Measured]:
    """Of GHN-orth Fig. 2, for the predictions called ``name``: means over the convolutions of each network, compared
    over networks and trainings."""
    means = correlations.groupby(["training", "network", "initialisation"])["deviation"].mean().unstack()
    leads = [paired_interval(rows[name], rows[f"{name}-orth"]) for _, rows in means.groupby(level="training")]
    return claims_over_trainings([{"orth-correlation": lead} for lead in leads])


def start_costs(setup: Setup, source: Source, architecture: Architecture, starts: Iterable[str]) -> dict[str, float]:
    """GFLOPs that it takes to make each start of an architecture: training on the source, prediction."""
    training = len(source.images.train) * step_flops([architecture])
    predicting = flops(lambda: source.trainings[0].predict(architecture.graph, predict_class_layers=False))
    costs = {}
    for start in starts:
        first, _, epoch = start.removesuffix("-orth").removesuffix("-head").partition(", ")
        epochs = setup.transfer.oracle_epochs if first == "trained" else int(bool(epoch))
        costs[start] = (epochs * training + (predicting if first == source.name else 0)) / 1e9
    return costs
