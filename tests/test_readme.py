"""The results in README.md are those of reports/*/metrics; ``make readme`` writes them."""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from ghnlib.params import read_merged, read_yaml

README = Path(__file__).parent.parent / "README.md"
START, END = (
    "<!-- results: written by `make readme` from reports/*/metrics -->",
    "<!-- end of results -->",
)
PAPER = {
    "random": ("", "0.2"), "mlp": ("42.2 ± 0.6", ""), "ghn1": ("51.4 ± 0.4", ""), "ghn2": ("66.9 ± 0.3", "14.3"),
    "ghn3": ("", "19.0"),
}  # fmt: skip
"""CIFAR-10 (PPUDA Table 3) and ImageNet (GHN-3 Tables 2 and 11), top-1 on in-distribution test architectures."""
SECTIONS = {
    "digits": ("Handwritten digits (default profile)", ("evaluate", "finetune", "transfer")),
    "digits-long": (
        "Handwritten digits, longer and in more sizes (`make repro PROFILE=digits-long`)", ("evaluate", "finetune")
    ),
    "cifar10-small": (
        "CIFAR-10, recompressed as JPEG (`make repro PROFILE=cifar10-small`)", ("evaluate", "finetune")
    ),
    "tiny-imagenet-transfer": (
        "From a part of Tiny-ImageNet to other images (`make repro PROFILE=tiny-imagenet-transfer`)", ("transfer",)
    ),
    "detection-small": (
        "Pedestrians of Penn-Fudan, by a hypernetwork near chance (`make repro PROFILE=detection-small`)", ("detection",)
    ),
}  # fmt: skip
"""By profile: title, and the stages of which the README tells the results."""
MEASURED_BY = {"detection": "transfer"}
"""The stage of what is not one itself."""
FIGURES = {"digits-long": ("evaluate", "scaling"), "cifar10-small": ("evaluate",)}
"""By profile: the figures shown; that of the default profile opens the page."""
CAPTIONS = {
    "evaluate": "Accuracy over architectures and training steps",
    "scaling": "Accuracy over parameters and FLOPs of training, for three sizes and meta-batches",
}


def results(root: Path) -> str:
    """The results section: one part for each profile with committed metrics of these stages."""
    parts = []
    for profile, (title, stages) in SECTIONS.items():
        folder = root / "reports" / profile
        metrics = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "metrics").glob("*.json"))}
        told = [stage for stage in stages if MEASURED_BY.get(stage, stage) in metrics]
        default, overlay = root / "params.yaml", root / "profiles" / f"{profile}.yaml"
        params = read_merged(default, overlay) if overlay.exists() else read_yaml(default)
        parts += [f"### {title}"] if told else []
        for stage in told:
            parts += TOLD[stage](metrics, params)
            for name in FIGURES.get(profile, ()) if stage == "evaluate" else ():
                parts.append(f"![{CAPTIONS[name]}](reports/{profile}/figures/{name}.png)")
        parts += [_claims(folder)] if told else []
    return "\n\n".join(parts)


def _claims(folder: Path) -> str:
    rows = list(csv.DictReader((folder / "claims.csv").read_text(encoding="utf-8").splitlines()))
    counts = Counter(row["verdict"].removesuffix(" (no interval)") for row in rows)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    against = "; ".join(f"{row['claim']} ({row['paper']})" for row in rows if row["verdict"] == "not held")
    adverse = sum(row["verdict"].startswith("not decided") and float(row["ours"]) <= 0 for row in rows)
    return (
        f"Of {len(rows)} [claims of the papers](reports/{folder.name}/8_claims.ipynb): {told}. "
        f"Contradicted here: {against or 'none'}. Not decided, but against the papers' direction: {adverse}."
    )


def _cell(value: Mapping | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.1f} ± {value['standard_error']:.1f}" if value["n"] > 1 else f"{value['mean']:.1f} (n = 1)"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _without_training(metrics: Mapping, params: Mapping) -> list[str]:
    accuracy = metrics["evaluate"]["accuracy"]
    splits = ("test", "wide", "deep", "dense", "bnfree")
    few = params["data"]["test_per_class"]
    images = f" on {few} test images of each class" if few else ""
    some = next(rows for method, rows in accuracy.items() if method in PAPER and len(rows) > 1)
    sizes = ", ".join(f"{some[split]['n']} {split}" for split in splits)
    others = accuracy["random"].get("wide", {}).get("n")
    fewer = f"; random and SGD: {others} of each split but test" if others else ""
    trained = {stage.removeprefix("train-"): value["steps"] for stage, value in metrics.items() if "train-" in stage}
    steps = max(trained.values())
    lines = [
        f"Top-1 accuracy (%) of unseen architectures **without any training of them**{images}, mean ± standard error "
        f"over architectures ({sizes}{fewer}); hypernetworks trained for {steps:,} steps, one seed, two CPU cores; chance is "
        f"{metrics['evaluate']['chance']:.0f}%.",
        "",
        _row(["parameters", *splits, "n test", "paper, CIFAR-10", "paper, ImageNet"]),
        _row(["---"] * 9),
    ]
    for method, rows in accuracy.items():
        if trained.get(method, steps) < steps:
            continue  # told by the figure of sizes
        cells = [_cell(rows.get(split)) for split in splits]
        lines.append(_row([method, *cells, str(rows["test"]["n"]), *PAPER.get(method, ("", ""))]))
    leads = [
        f"Correct batches of graphs against those of the released code, at equal steps: {pair} {found['mean']:.1f} points "
        f"[{found['low']:.1f}, {found['high']:.1f}]."
        for pair, found in metrics["evaluate"].get("batching", {}).items()
    ]
    return ["\n".join(lines), *leads]


def _fine_tuned(metrics: Mapping, params: Mapping) -> list[str]:
    count, table = _by_moment(metrics["finetune"]["accuracy"])
    found = (setting for of_budget in metrics["finetune"]["tuned"].values() for setting in of_budget.values())
    chosen = " or ".join(sorted({setting.get("optimizer", "sgd") for setting in found}))
    return [
        f"Accuracy (%) after training from each initialisation, {count} architectures, seeds {params['finetune']['seeds']}, "
        f"settings ({chosen} and its rate) tuned equally on {params['finetune']['tuning_networks']} validation architecture(s):",
        table,
    ]


def _transferred(metrics: Mapping, params: Mapping) -> list[str]:
    settings, transfer = params["transfer"], metrics["transfer"]
    parts = []
    for target, accuracy in transfer["accuracy"].items():
        count, table = _by_moment(accuracy)
        few = {**params["data"], **settings["targets"].get(target, {})}["test_per_class"]
        images = f" ({few} test images of each class)" if few else ""
        parts += [
            f"Accuracy (%) on {target}{images}, which the hypernetwork did not see, after SGD on {settings['per_class']} images of "
            f"each class, {count} architectures, seeds {settings['seeds']}, learning rates tuned equally on "
            f"{settings['tuning_networks']} validation architecture(s) (-orth: orthogonal post-processing; trained: "
            f"first on the hypernetwork's classes; chance is {transfer['chance'][target]:.0f}%):",
            table,
        ]
    return [*parts, _detected(transfer, settings["detection"])]


def _detected(transfer: Mapping, settings: Mapping) -> str:
    scenes = "digit scenes" if settings["root"] is None else "Penn-Fudan"
    found = ", ".join(f"{name} {value:.1f}" for name, value in transfer["average_precision"].items())
    return (
        f"Average precision (%) of Faster R-CNN on {settings['test_scenes']} images ({scenes}, {settings['image_size']} "
        f"pixels), trained for {settings['epochs']} epochs, the rate tuned for each initialisation, seeds "
        f"{settings['seeds']}: {found}."
    )


def _by_moment(accuracy: Mapping) -> tuple[int, str]:
    """Number of architectures, and a table with a row for each initialisation and a column for each moment."""
    moments = sorted(next(iter(accuracy.values())), key=lambda moment: ("epoch" in moment, int(moment.split()[0])))
    lines = [_row(["initialisation", *moments]), _row(["---"] * (len(moments) + 1))]
    first = sorted(accuracy, key=lambda method: method not in ("random", "orthogonal"))
    lines += [_row([method, *(_cell(accuracy[method][moment]) for moment in moments)]) for method in first]
    return next(iter(accuracy.values()))[moments[0]]["n"], "\n".join(lines)


def _detection_alone(metrics: Mapping, params: Mapping) -> list[str]:
    return [_detected(metrics["transfer"], params["transfer"]["detection"])]


TOLD = {
    "evaluate": _without_training, "finetune": _fine_tuned, "transfer": _transferred, "detection": _detection_alone,
}  # fmt: skip


def test_the_numbers_of_the_readme_are_those_of_the_committed_metrics():
    changed = ["git", "-C", str(README.parent), "diff", "--quiet", "HEAD", "--", "reports"]
    if subprocess.run(changed, check=False, capture_output=True).returncode == 1:
        pytest.skip("reports were made anew since the last commit: make readme writes their numbers")
    section = README.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip()
    assert section == results(README.parent)


def write() -> None:
    """Replace the results section of README.md."""
    text = README.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(f"{before}{START}\n\n{results(README.parent)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
