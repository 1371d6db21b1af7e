"""The papers' claims (ghnlib/reporting/claims.yaml) joined with what the stages of a profile have recorded."""

import json
from collections.abc import Iterable, Mapping
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ghnlib.params import Params
from ghnlib.pipeline.notebooks import NOTEBOOKS, label, write_text
from ghnlib.reporting.publish import claim_of, known_claims
from ghnlib.reporting.statistics import Measured, number_of


def read_metrics(profile: str, trainings: Iterable[str]) -> dict[str, Any]:
    """What each stage measured, by stage: those of reports/PROFILE/metrics that the pipeline has now."""
    names = (label(stage, name) for stage in NOTEBOOKS for name in (trainings if stage == "train" else [""]))
    files = {name: Path("reports", profile, "metrics", f"{name}.json") for name in names}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def scales(params: Params) -> dict[str, str]:
    """By stage with claims: images, space of architectures, SGD steps, seeds; "networks" that no hypernetwork took part
    in, "detection". ``params``: or a ``Setup``."""
    data, tuning, transfer, anytime = params.data, params.finetune, params.transfer, params.anytime
    detection = transfer.detection
    images = Path(data.root or data.source).name + (f" {data.image_size} px" if data.image_size else "")
    space = f"{images}, {params.deepnets.scale}"
    steps = sorted({params.train.recipe_of(name).steps for name in params.train.plain})
    seeds = number_of(len(params.train.seeds), "training seed")
    ghn = f"{space}, GHN {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))} steps, {seeds}"
    budgets = " or ".join(f"{epochs:g}" for epochs in tuning.budgets)
    return {
        "evaluate": ghn,
        "finetune": f"{ghn}, then {budgets} epochs, seeds: {len(tuning.seeds)}",
        "transfer": f"{space}, GHN {transfer.train_steps} steps, then {transfer.steps} on {transfer.per_class} "
        f"images a class, seeds: {len(transfer.seeds)}",
        "analysis": f"{ghn}, networks {params.analysis.property_steps} steps",
        "networks": f"{space}, networks {params.analysis.property_steps} steps",
        "detection": f"{space}, GHN {transfer.train_steps} steps, then {detection.epochs} epochs of "
        f"{detection.train_scenes} scenes, seeds: {len(detection.seeds)}",
        "anytime": f"{images}, {anytime.blocks.cells} blocks, GHN {anytime.recipe.steps} steps, networks "
        f"{anytime.blocks.steps} or {anytime.exits.steps}, {number_of(len(anytime.seeds), 'training seed')}",
    }


def recorded_claims(metrics: Mapping[str, Any]) -> dict[str, Measured]:
    """What the stages recorded, by the claim's id, or "id/what it is of".

    Args:
        metrics: those of all stages, by stage (``read_metrics``).

    Raises:
        KeyError: a stage recorded a claim that claims.yaml lacks.
        ValueError: or one that is another stage's.
    """
    found = {}
    for stage, measured in metrics.items():
        for key, values in measured.get("claims", {}).items():
            if (own := claim_of(key).stage) != stage:
                raise ValueError(f"the stage {stage} has recorded {key!r}, in claims.yaml a claim of {own}")
            found[key] = Measured(**values | {"value": inf if values["value"] is None else values["value"]})
    return found


def claims_table(metrics: Mapping[str, Any], scales: Mapping[str, str]) -> pd.DataFrame:
    """Rows for each claim: ``paper``, ``claim``, ``published``, ``ours``, ``low``, ``high``, ``scale``, ``verdict``,
    ``differs`` (where not held: what, from the paper).

    Verdicts: ``Claim.verdict``. A claim that no stage has recorded is not testable at this scale.

    Args:
        metrics: those of all stages, by stage (``read_metrics``).
        scales: of each stage.
    """
    found = recorded_claims(metrics)
    keys = ([key for key in found if key.partition("/")[0] == name] or [name] for name in known_claims())
    return pd.DataFrame([_row(key, found.get(key, Measured(nan)), scales) for of_claim in keys for key in of_claim])


def _row(key: str, ours: Measured, scales: Mapping[str, str]) -> dict[str, Any]:
    claim, count = claim_of(key), f", {ours.count}" if ours.count else ""
    verdict = claim.verdict(ours)
    value, low, high = (float(f"{x:.3g}") for x in ours[:3])
    scale = "" if isnan(ours.value) else scales[claim.scale or claim.stage] + count
    return {
        "paper": claim.paper, "claim": claim.claim, "published": claim.published, "ours": value, "low": low,
        "high": high, "scale": scale, "verdict": verdict, "differs": claim.differs if verdict == "not held" else "",
    }  # fmt: skip


def headline(metrics: Mapping[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """The few numbers that ``dvc metrics show`` prints; all of them are in reports/PROFILE/metrics.

    Mean accuracy (%) on test architectures without training, that after the longest fine-tuning, and claims by verdict.
    """
    without = metrics.get("evaluate", {}).get("accuracy", {})
    tuned = metrics.get("finetune", {}).get("accuracy", {})
    verdicts = table["verdict"].str.partition(" (")[0].value_counts()
    found = {
        "test": {name: of["test"]["mean"] for name, of in without.items() if not name.startswith("SGD")},
        "tuned": {start: list(moments.values())[-1]["mean"] for start, moments in tuned.items()},
        "claims": {verdict: int(verdicts.get(verdict, 0)) for verdict in ("held", "not held")},
    }
    rounded = {part: {name: round(value, 1) for name, value in of.items()} for part, of in found.items() if of}
    return rounded | {"from": "provenance.json"}


def write_claims(profile: str, metrics: Mapping[str, Any], table: pd.DataFrame) -> None:
    """Write the headline numbers, reports/PROFILE/metrics.json, and the table of claims, claims.csv."""
    folder = Path("reports", profile)
    write_text(json.dumps(headline(metrics, table), indent=1) + "\n", folder / "metrics.json")
    write_text(table.to_csv(index=False), folder / "claims.csv")


class Agreement(NamedTuple):
    """Two tables of claims of one profile, made on different machines.

    Attributes:
        compared: claims with a number in both. decided: of these held or not held in both; same: with one verdict.
        outside: claims whose number lies outside the other's interval, in either direction.
        largest: difference between numbers in standard errors of it, the largest, of the claim ``of``.
    """

    compared: int
    decided: int
    same: int
    outside: list[str]
    largest: float
    of: str

    def __str__(self) -> str:
        claims = f"{self.same} of {self.decided} claims decided in both have the same verdict"
        furthest = f"; largest difference {self.largest:.1f} standard errors ({self.of})" if self.compared else ""
        return f"{claims}, {len(self.outside)} of {self.compared} numbers lie outside the other's interval{furthest}"


def agreement(first: pd.DataFrame, second: pd.DataFrame) -> Agreement:
    """Compare two tables of ``claims_table``."""
    both = first.merge(second, on=["paper", "claim"], suffixes=("_1", "_2")).dropna(subset=["ours_1", "ours_2"])
    decided = both[both[["verdict_1", "verdict_2"]].isin(["held", "not held"]).all(axis=1)]
    both = both.dropna(subset=["low_1", "high_1", "low_2", "high_2"])
    within = both["ours_1"].between(both["low_2"], both["high_2"]) & both["ours_2"].between(
        both["low_1"], both["high_1"]
    )
    widths = np.hypot(both["high_1"] - both["low_1"], both["high_2"] - both["low_2"]) / (2 * 1.96)
    away = ((both["ours_1"] - both["ours_2"]).abs() / widths).where(widths > 0, 0.0)
    furthest = both.loc[away.idxmax(), "claim"] if len(both) else ""
    same = int((decided["verdict_1"] == decided["verdict_2"]).sum())
    return Agreement(
        len(both), len(decided), same, both.loc[~within, "claim"].tolist(), away.max() if len(both) else nan, furthest
    )
