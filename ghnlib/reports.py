"""What a notebook leaves behind: metrics, tidy tables, a trained hypernetwork."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ghnlib.hypernetwork import GHN


def publish(profile: str, stage: str, metrics: Mapping, tables: Mapping[str, pd.DataFrame] | None = None) -> None:
    """Write a stage's metrics (JSON, for ``dvc metrics``) and its tidy tables (``results/NAME.csv``)."""
    path = Path("reports", profile, "metrics", f"{stage}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    for name, table in (tables or {}).items():
        Path("results").mkdir(exist_ok=True)
        table.to_csv(Path("results", f"{name}.csv"), index=False)


def publish_model(folder: str | Path, variant: str) -> GHN:
    """Move the outcome of a training to ``models/VARIANT``: the hypernetwork and its history."""
    target = Path("models", variant)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(Path(folder, "model"), target)
    shutil.copy(Path(folder, "history.csv"), target)
    return GHN.from_pretrained(target)


def save_figure(figure: Figure, profile: str, name: str) -> None:
    """Write a figure that is shown outside its notebook to ``reports/PROFILE/figures/NAME.png``."""
    path = Path("reports", profile, "figures", f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
