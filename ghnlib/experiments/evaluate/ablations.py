"""Hypernetworks that differ in one thing: rows of the papers' ablation tables, and claims that one option is better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import permutations, product
from math import inf
from typing import Any

import pandas as pd

from ghnlib.experiments.setup import Setup, training_name
from ghnlib.reporting.statistics import Measured, over_trainings, paired_interval, with_deviation, with_interval
from ghnlib.variants import Train

Options = Mapping[str, Any]


def options_of(train: Train) -> dict[str, dict[str, Any]]:
    """Of each variant all options of its hypernetwork and of its training that numbers depend on."""
    options = {name: asdict(train.config(name)) | asdict(train.recipe_of(name)) | {"start": variant.start_from}
               for name, variant in train.variants.items()}  # fmt: skip
    return {name: {key: own[key] for key in own if key != "validate_every"} for name, own in options.items()}


def changes(a: Options, b: Options) -> dict[str, Any]:
    """The options of a that differ from b."""
    return {key: value for key, value in a.items() if value != b[key]}


def bases(train: Train) -> dict[str, str]:
    """Row of an ablation -> its base, the longest variant that its name goes on from: "ghn2" of "ghn2-forward". Where
    there are such rows, MLP is one of GHN-2 too (PPUDA Table 8)."""
    names = train.plain
    starts = {name: [base for base in names if name.startswith(f"{base}-")] for name in names}
    found = {name: max(of, key=len) for name, of in starts.items() if of}
    return found | {"mlp": "ghn2"} if found and {"mlp", "ghn2"} <= {*names} else found


def ablation_table(setup: Setup, tests: Sequence[pd.DataFrame], costs: pd.DataFrame) -> pd.DataFrame:
    """One row each of ``bases`` and, before them, of the bases themselves.

    Columns ``base``, what ``changes``, ``test (%)``, mean ± deviation over trainings, ``difference`` from the base,
    paired by architecture and seed, ``parameters``, and if ``setup.evaluate.seconds`` the median ``seconds a step`` of
    trainings on this machine.

    Args:
        tests: accuracies of each training, see ``Evaluation.tests``. costs: see ``training_costs``.
    """
    found, options, rows = bases(setup.train), options_of(setup.train), {}
    for name in sorted({*found, *found.values()}):  # a base's name begins those of its rows
        base = found.get(name, name)
        changed = changes(options[name], options[base])
        lead = over_trainings([paired_interval(test[name], test[base]) for test in tests])
        rows[name] = {
            "base": base if changed else "",
            "changes": ", ".join(f"{key}: {value}" for key, value in changed.items()),
            "test (%)": with_deviation(test[name].mean() for test in tests),
            "difference": with_interval(lead) if changed else "",
            "parameters": costs.loc[name, "parameters"],
        } | ({"seconds a step": _seconds_a_step(setup, name)} if setup.evaluate.seconds else {})
    return pd.DataFrame(rows).T


def _seconds_a_step(setup: Setup, variant: str) -> float:
    """Of trainings that this folder keeps; NaN: they came from elsewhere."""
    folders = [setup.folder.with_name(f"train-{training_name(variant, seed)}") for seed in setup.train.seeds]
    logs = [pd.read_csv(path) for folder in folders if (path := folder / "throughput.csv").exists()]
    networks = pd.concat([log["networks_per_second"] for log in logs]).median() if logs else float("nan")
    return round(setup.train.recipe_of(variant).meta_batch / networks, 3)


def _prefers(key: str, ahead: object, behind: object, **within: object) -> Callable[[Options, Options, Options], bool]:
    """Whether two variants differ in one option, in these values; ``within``: others that both have."""
    return lambda a, b, both: (a, b) == ({key: ahead}, {key: behind}) and within.items() <= both.items()


PREFERRED: dict[str, Callable[[Options, Options, Options], bool]] = {
    "batching": _prefers("batching", "aligned", "misaligned"),
    "penalty": lambda a, b, _: set(a) == {"gamma"} and not b["gamma"],
    "larger-hypernetwork": lambda a, b, _: {"hid"} <= set(a) <= {"hid", "layers"} and all(a[key] > b[key] for key in a),
    "larger-meta-batch": lambda a, b, _: set(a) == {"meta_batch"} and a["meta_batch"] > b["meta_batch"],
    "meta-batch-equal-networks": lambda a, b, _: set(a) == {"meta_batch", "steps"} and a["meta_batch"] > b["meta_batch"]
    and a["meta_batch"] * a["steps"] == b["meta_batch"] * b["steps"],
    "normalisation": _prefers("weight_norm", True, False, encoder="gated_gnn"),
    "virtual-edges": _prefers("virtual_edges", True, False, encoder="gated_gnn", weight_norm=True),
    "layernorm": _prefers("layernorm", True, False, encoder="gated_gnn", weight_norm=True),  # not of GHN-1
    "shape-encoding": _prefers("shape_encoding", True, False, encoder="gated_gnn"),
    "both-passes": _prefers("directions", "both", "forward", encoder="gated_gnn"),
    "conv-decoder": _prefers("decoder", "conv", "mlp", encoder="gated_gnn"),
    "more-architectures": lambda a, b, _: set(a) == {"architectures"}
    and (a["architectures"] or inf) > (b["architectures"] or inf),
    "backward-edges": _prefers("directions", "both", "forward", encoder="graphormer"),
    "edges": _prefers("directions", "both", "none", encoder="graphormer"),
    "attention": _prefers("attention", True, False, encoder="graphormer"),
    "centrality": _prefers("centrality", True, False, encoder="graphormer"),
    "input-distance": _prefers("input_distance", True, False, encoder="graphormer"),
}  # fmt: skip
"""Claim -> whether it prefers a variant to another, by the options of each in which the two differ, and all of the
first."""


def claims_of_changes(setup: Setup, tests: Sequence[pd.DataFrame]) -> dict[str, Measured]:
    """Points on test architectures by which variants that a claim of ``PREFERRED`` prefers are ahead.

    Args:
        tests: accuracies of each training, see ``Evaluation.tests``.

    Returns:
        "CLAIM/A over B" -> points, paired by architecture and by seed of training.
    """
    found, options = {}, options_of(setup.train)
    for (claim, preferred), (a, b) in product(PREFERRED.items(), permutations(options, 2)):
        ours, theirs = changes(options[a], options[b]), changes(options[b], options[a])
        if ours and preferred(ours, theirs, options[a]):
            found[f"{claim}/{a} over {b}"] = over_trainings([paired_interval(test[a], test[b]) for test in tests])
    return found


def claims_of_gradients(setup: Setup) -> dict[str, Measured]:
    """Of PPUDA Fig. 9, for GHN-2 trained with two meta-batches and otherwise alike: "gradient-norm/A over B" -> by how
    much the gradient's norm is larger with the smaller."""
    options, found = options_of(setup.train), {}
    for a, b in permutations(options, 2):
        larger = changes(options[b], options[a])
        alike = options[a]["encoder"] == "gated_gnn" and [*larger] == ["meta_batch"]
        if alike and larger["meta_batch"] > options[a]["meta_batch"]:
            small, large = (setup.history(name).groupby("seed")["grad_norm"].mean() for name in (a, b))
            leads = [Measured(float(lead)) for lead in small - large]
            found[f"gradient-norm/{a} over {b}"] = over_trainings(leads)
    return found
