"""The results in README.md (the headline of the default profile) and reports/README.md (all), from reports/*/metrics:
``python -m ghnlib.pipeline.readme`` (``make readme``).
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ghnlib.params import Params
from ghnlib.params_file import read_merged, read_yaml, validate
from ghnlib.pipeline.claims import Agreement, recorded_claims
from ghnlib.pipeline.notebooks import NOTEBOOKS, write_text
from ghnlib.reporting.publish import EVALUATED, claim_of, known_claims, published
from ghnlib.reporting.statistics import number_of

START = "<!-- results: written by `make readme` from reports/*/metrics -->"
END = "<!-- end of results -->"
ORDER = {
    "without-training-ghn2-ghn1": "GHN-2 over GHN-1",
    "without-training-ghn2-mlp": "GHN-2 over MLP",
    "without-training-ghn3-ghn2": "GHN-3 over GHN-2",
}
"""Claims about the order of the four hypernetworks, in short."""
CAPTIONS = {
    "evaluate": "Accuracy over architectures and training steps",
    "scaling": "Accuracy over parameters and FLOPs of training",
}


class ProfileSection(NamedTuple):
    """What is told of a profile: names of TOLD; figures behind the accuracy without training; stages whose claims
    count, the others being short; a note."""

    title: str
    told: tuple[str, ...]
    figures: tuple[str, ...] = ()
    claims: tuple[str, ...] = tuple(NOTEBOOKS)
    note: str = ""


SECTIONS = {
    "digits": ProfileSection("Handwritten digits (default profile)", ("evaluate", "finetune", "transfer")),
    "digits-pretrained": ProfileSection(
        "The hypernetwork of the package for digits (`make repro PROFILE=digits-pretrained`)",
        ("evaluate",), claims=("evaluate",),
    ),
    "ablations": ProfileSection(
        "One thing changed at a time (`make repro PROFILE=ablations`)", ("evaluate",), claims=("evaluate",),
        note="Variants of fewer steps, and each beside its base and the papers' numbers: in the report on accuracy. "
        "The seconds a step there are of trainings beside other work, and compare nothing.",
    ),
    "cifar10-pretrained": ProfileSection(
        "The first 50,000 steps of the package's hypernetwork for CIFAR-10 (`make repro PROFILE=cifar10-pretrained`)",
        ("evaluate",), ("evaluate",), claims=("evaluate",),
    ),
    "cifar10-continued": ProfileSection(
        "150,000 steps more of the package's hypernetwork for CIFAR-10 (`make repro PROFILE=cifar10-continued`)",
        ("evaluate",), ("evaluate",), claims=("evaluate",),
        note="It has the 50,000 steps above behind it.",
    ),
    "cifar10-longer": ProfileSection(
        "The hypernetwork of the package for CIFAR-10: another 150,000 steps (`make repro PROFILE=cifar10-longer`)",
        ("evaluate",), ("evaluate",), claims=("evaluate",),
        note="It has the 200,000 steps above behind it.",
    ),
    "digits-long": ProfileSection(
        "Handwritten digits, longer (`make repro PROFILE=digits-long`)",
        ("evaluate", "finetune", "transfer"), ("evaluate",),
    ),
    "cifar10-small": ProfileSection(
        "CIFAR-10, recompressed as JPEG (`make repro PROFILE=cifar10-small`)", ("evaluate", "finetune"), ("evaluate",),
        note="By earlier code, in an earlier design space.",
    ),
    "fashion": ProfileSection(
        "Digits' hypernetworks continued on clothes, against trainings from scratch (`make repro PROFILE=fashion`)",
        ("evaluate",), claims=("evaluate",),
        note="Those continued have the default profile's steps behind them.",
    ),
    "tiny-imagenet-transfer": ProfileSection(
        "From a part of Tiny-ImageNet to other images (`make repro PROFILE=tiny-imagenet-transfer`)", ("transfer",),
        note="By earlier code, in an earlier design space.",
    ),
    "detection-small": ProfileSection(
        "Pedestrians of Penn-Fudan, by a hypernetwork near chance (`make repro PROFILE=detection-small`)",
        ("detection",), note="By earlier code, in an earlier design space.",
    ),
}  # fmt: skip
"""By profile, the default one first; its figure opens README.md."""


def main() -> int:
    """Replace the results sections of both files; the exit status is 1 if one has none."""
    for name, told in {"README.md": headline, "reports/README.md": results}.items():
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        if not text.count(START) == text.count(END) == 1:
            print(f"{name} lacks the lines between which results stand: {START} and {END}", file=sys.stderr)
            return 1
        before, after = text.split(START)[0], text.split(END)[1]
        write_text(f"{before}{START}\n\n{told(Path())}\n\n{END}{after}", path)
    return 0


def headline(root: Path) -> str:
    """For README.md: accuracy without training in the default profile, and how its claims stand."""
    name, section = next(iter(SECTIONS.items()))
    paragraphs = _part(root, name, section._replace(told=("evaluate",)), "reports/")
    table = verdicts(root)
    longer = _longer(root, "digits-long", table.get("digits-long", {}))
    return "\n\n".join([*paragraphs[1:-1], *longer, *paragraphs[-1:], *_over_profiles(table)])


def _longer(root: Path, profile: str, found: Mapping[str, str]) -> list[str]:
    """The same hypernetworks in a profile that trains them longer, on the test split, and their order. ``found``: the
    profile's column of ``verdicts``."""
    metrics, params = _metrics(root / "reports" / profile), params_of(root, profile)
    if _trainings(metrics, params) < 2 or "evaluate" not in metrics:
        return []
    accuracy, trained = metrics["evaluate"]["accuracy"], _steps(metrics, params)
    means = ", ".join(f"{name} {_mean(accuracy[name]['test'], True)}" for name in accuracy if name in trained)
    leads = []
    for key, words in ORDER.items():
        value, _, verdict = found.get(key, "").partition(" ")
        leads += [f"{words} by {value} ({verdict})"] if verdict else []
    return [
        f"Trained for {max(trained.values()):,} steps on {params.deepnets.train_pool:,} architectures "
        f"([{profile}](reports/{profile}/3_evaluate.ipynb), {_trainings(metrics, params)} trainings of each), they "
        f"have {means} on test: {', '.join(leads)}."
    ]


def results(root: Path) -> str:
    """For reports/README.md: a part for each profile with metrics under ``root``, by its parameters there."""
    parts = [_part(root, profile, section) for profile, section in SECTIONS.items()]
    return "\n\n".join(paragraph for part in (*parts, _all_claims(root)) for paragraph in part)


def _all_claims(root: Path) -> list[str]:
    table = verdicts(root)
    if table.empty:
        return []
    rows = [[claim_of(key).claim, claim_of(key).paper, *found] for key, found in zip(table.index, table.to_numpy())]
    blank = "A number and its verdict; blank: not testable in this profile."
    columns = ["claim: above 0 is", "paper", *table.columns]
    return ["## Claims over all profiles", *_over_profiles(table), blank, _table(columns, rows)]


def verdicts(root: Path) -> pd.DataFrame:
    """Number and verdict of each claim that a profile decides or could, in the order of claims.yaml: rows are ids, a
    column for each profile whose hypernetworks were trained several times; "" where a profile cannot test it."""
    found = {}
    for profile, section in SECTIONS.items():
        metrics = _metrics(root / "reports" / profile)
        if _trainings(metrics, params_of(root, profile)) > 1:
            own = {stage: metrics[stage] for stage in section.claims if stage in metrics}
            words = {key: (claim_of(key).verdict(ours), ours.value) for key, ours in recorded_claims(own).items()}
            found[profile] = {
                key: f"{value:+.3g} {word.partition(' (')[0]}"
                for key, (word, value) in words.items() if not word.startswith("not testable")
            }  # fmt: skip
    order = list(known_claims())
    found = {profile: of for profile, of in found.items() if of}
    keys = sorted(
        {key for of in found.values() for key in of}, key=lambda key: (order.index(key.partition("/")[0]), key)
    )
    return pd.DataFrame(found, index=keys, dtype=object).fillna("")


def _over_profiles(table: pd.DataFrame) -> list[str]:
    """``table``: as from ``verdicts``."""
    if table.empty:
        return []
    verdict = table.replace(r"^\S+ ", "", regex=True)
    held, not_held = (verdict == "held").any(axis=1), (verdict == "not held").any(axis=1)
    both = held & not_held
    return [
        f"Over the {table.shape[1]} profiles with several trainings, {(held | not_held).sum()} of "
        f"{len(known_claims())} claims are decided: {(held & ~both).sum()} held, {(not_held & ~both).sum()} not held, "
        f"{both.sum()} held in one and not in another."
    ]


def _part(root: Path, profile: str, section: ProfileSection, reports: str = "") -> list[str]:
    """``reports``: the way to the folder of the reports, for links."""
    folder = root / "reports" / profile
    metrics = _metrics(folder)
    told = [name for name in section.told if TOLD[name].stage in metrics]
    if not told:
        return []
    params, paragraphs = params_of(root, profile), [f"## {section.title}", *filter(None, [section.note])]
    for name in told:
        paragraphs += TOLD[name].tell(metrics, params)
        figures = section.figures if name == "evaluate" else ()
        paragraphs += [f"![{CAPTIONS[figure]}]({reports}{profile}/figures/{figure}.png)" for figure in figures]
    if _trainings(metrics, params) == 1:
        return [*paragraphs, "Hypernetworks were trained once each, so that no claim about them is decided here."]
    return paragraphs + ([_claims(folder, reports)] if set(NOTEBOOKS) == set(section.claims) else [])


def _metrics(folder: Path) -> dict[str, Any]:
    """What the stages of a profile measured, by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "metrics").glob("*.json"))}


def params_of(root: Path, profile: str) -> Params:
    """Parameters of a profile, or the default ones."""
    default, overlay = root / "params.yaml", root / "profiles" / f"{profile}.yaml"
    return validate(read_merged(default, overlay), str(overlay)) if overlay.exists() else validate(read_yaml(default))


def _claims(folder: Path, reports: str) -> str:
    """How the claims of claims.csv stand, and which are contradicted."""
    table = pd.read_csv(folder / "claims.csv")
    verdicts = table["verdict"].str.partition(" (")[0]
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.value_counts().sort_index().items())
    contradicted = table[verdicts == "not held"]
    against = "; ".join(f"{claim} ({paper})" for claim, paper in zip(contradicted["claim"], contradicted["paper"]))
    adverse = ((verdicts == "not decided") & (table["ours"] <= 0)).sum()
    decided = verdicts.isin(["held", "not held"]).sum()
    return (
        f"Of {len(table)} [claims of the papers]({reports}{folder.name}/8_claims.ipynb): {told}. "
        f"Contradicted here: {against or 'none'}. Not decided, but against the papers' direction: {adverse}."
        f"{_elsewhere(folder / 'elsewhere.json', decided)}"
    )


def _elsewhere(path: Path, decided: int) -> str:
    """How the claims, ``decided`` of which have a verdict, agree with those under another arithmetic
    (benchmarks/elsewhere.py), if that was run."""
    if not path.exists():
        return ""
    found = Agreement(**{name: value for name, value in json.loads(path.read_text()).items() if name != "arithmetic"})
    return (
        f" Run anew with narrower vector instructions, which stands for another processor: of the {decided} claims "
        f"decided here {found.decided} are decided there too, {found.same} alike; of {found.compared} numbers "
        f"{len(found.outside)} lie outside the other's interval."
    )


def _without_training(metrics: Mapping[str, Any], params: Params) -> list[str]:
    found, trained = metrics["evaluate"], _steps(metrics, params)
    steps = max(trained.values())
    cifar10, imagenet = published("evaluate/cifar10"), published("evaluate/imagenet")
    rows = [
        [method, *(_mean(of_split.get(split), method in trained) for split in EVALUATED), str(of_split["test"]["n"]),
         cifar10.get(method, ""), imagenet.get(method, "")]
        for method, of_split in found["accuracy"].items()
        if trained.get(method, steps) == steps  # the figure of sizes tells what was trained for less
    ]  # fmt: skip
    few, several = params.data.test_per_class, _trainings(metrics, params)
    spread = f"mean ± deviation over {several} trainings, each on" if several > 1 else "one training, on"
    images = f" on {few} test images of each class" if few else ""
    text = (
        f"Top-1 accuracy (%) of unseen architectures **without any training of them**{images}; chance is "
        f"{found['chance']:.0f}%. Hypernetworks: {steps:,} steps, {spread} {_sizes(found['accuracy'], trained)}. "
        f"Random parameters and SGD: mean ± standard error over *n* test architectures{_fewer(found['accuracy'])}."
    )
    table = _table(["parameters", *EVALUATED, "*n*", "paper, CIFAR-10", "paper, ImageNet"], rows)
    return [text, table]


def _steps(metrics: Mapping[str, Any], params: Params) -> dict[str, int]:
    """Steps that the hypernetworks were trained for, by variant. Earlier reports had one training of each."""
    trained = {name.removeprefix("train-"): value for name, value in metrics.items() if name.startswith("train-")}
    return {params.train.trainings.get(name, (name, 0))[0]: value["steps"] for name, value in trained.items()}


def _trainings(metrics: Mapping[str, Any], params: Params) -> int:
    """How many trainings there are of a hypernetwork."""
    return sum(name.startswith("train-") for name in metrics) // max(1, len(_steps(metrics, params)))


def _sizes(accuracy: Mapping[str, Any], trained: Iterable[str]) -> str:
    """Numbers of architectures that a hypernetwork is measured on."""
    some = next(accuracy[name] for name in accuracy if name in trained)
    return ", ".join(f"{some[split]['n']} {split}" for split in EVALUATED)


def _fewer(accuracy: Mapping[str, Any]) -> str:
    """And the yardsticks on those of other splits."""
    others = accuracy["random"].get("wide", {}).get("n")
    return f" and {others} of each other split" if others else ""


def _fine_tuned(metrics: Mapping[str, Any], params: Params) -> list[str]:
    found, finetune = metrics["finetune"], params.finetune
    settings = (setting for of_budget in found["tuned"].values() for setting in of_budget.values())
    chosen = " or ".join(sorted({setting.get("optimizer", "sgd") for setting in settings}))
    text = (
        "Accuracy (%) after training from each initialisation, mean ± standard error over "
        f"{_count(found['accuracy'])} architectures, seeds "
        f"{list(finetune.seeds)}, settings ({chosen} and its rate) tuned equally on "
        f"{number_of(finetune.tuning_networks, 'validation architecture')}:"
    )
    return [text, _by_moment(found["accuracy"])]


def _transferred(metrics: Mapping[str, Any], params: Params) -> list[str]:
    found, transfer, paragraphs = metrics["transfer"], params.transfer, []
    for target, accuracy in found["accuracy"].items():
        other = transfer.targets.get(target)
        data = params.data.model_copy(update=other.model_dump(exclude_unset=True)) if other else params.data
        images = f" ({data.test_per_class} test images of each class)" if data.test_per_class else ""
        head = "-head: with the hypernetwork's class layer; " if any(n.endswith("-head") for n in accuracy) else ""
        text = (
            f"Accuracy (%) on {target}{images}, which the hypernetwork did not see, after SGD on {transfer.per_class} "
            f"images of each class, mean ± standard error over "
            f"{_count(accuracy)} architectures, seeds {list(transfer.seeds)}, learning rates "
            f"tuned equally on {number_of(transfer.tuning_networks, 'validation architecture')} (-orth: orthogonal "
            f"post-processing; {head}trained: first on the hypernetwork's classes; chance is "
            f"{found['chance'][target]:.0f}%):"
        )
        paragraphs += [text, _by_moment(accuracy)]
    return paragraphs + _detected(metrics, params)


def _detected(metrics: Mapping[str, Any], params: Params) -> list[str]:
    detection = params.transfer.detection
    scenes = "digit scenes" if detection.root is None else "Penn-Fudan"
    precision = metrics["transfer"]["average_precision"]
    lost = {name: count for name, count in metrics["transfer"].get("diverged_detectors", {}).items() if count}
    diverged = f" Diverged, and counted as 0: {', '.join(f'{count} from {name}' for name, count in lost.items())}."
    return [
        f"Average precision (%) of Faster R-CNN on {detection.test_scenes} images ({scenes}, {detection.image_size} "
        f"pixels), trained for {detection.epochs} epochs, the rate tuned for each initialisation, seeds "
        f"{list(detection.seeds)}: {', '.join(f'{name} {value:.1f}' for name, value in precision.items())}."
        + diverged
        * bool(lost)
    ]


class Told(NamedTuple):
    """Paragraphs about the metrics of a stage."""

    stage: str
    tell: Callable[[Mapping[str, Any], Params], list[str]]


TOLD = {
    "evaluate": Told("evaluate", _without_training),
    "finetune": Told("finetune", _fine_tuned),
    "transfer": Told("transfer", _transferred),
    "detection": Told("transfer", _detected),
}


def _by_moment(accuracy: Mapping[str, Any]) -> str:
    """A row for each initialisation, a column for each moment of training."""
    moments = sorted(next(iter(accuracy.values())), key=lambda moment: ("epoch" in moment, int(moment.split()[0])))
    first = sorted(accuracy, key=lambda method: method not in ("random", "orthogonal"))
    rows = [[method, *(_mean(accuracy[method][moment]) for moment in moments)] for method in first]
    return _table(["initialisation", *moments], rows)


def _count(accuracy: Mapping[str, Any]) -> int:
    """Number of architectures that the first initialisation is measured on."""
    return next(iter(next(iter(accuracy.values())).values()))["n"]


def _mean(value: Mapping[str, float] | None, predicted: bool = False) -> str:
    """Of hypernetworks, ``predicted``, with the deviation over trainings, if there are several."""
    if value is None:
        return ""
    if not predicted and value["n"] < 3:
        return f"{value['mean']:.1f} (n = {value['n']})"
    spread = value.get("over_trainings") if predicted else value["standard_error"]
    return f"{value['mean']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    sys.exit(main())
