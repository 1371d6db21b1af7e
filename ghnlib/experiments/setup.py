"""What every report begins with: its parameters, typed; images, architectures and hypernetworks that they name."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isinf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import torch

from ghnlib import params
from ghnlib.architectures.architecture import Architecture
from ghnlib.data.images import Augment
from ghnlib.data.sources import ImageSplits, augmentation_of, images_of
from ghnlib.deepnets.dataset import DeepNets, architectures_of
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import evaluate_predictions
from ghnlib.params_file import ParamsError, read_yaml, validate
from ghnlib.training.devices import device_of
from ghnlib.training.jobs import Job, architecture_of
from ghnlib.training.networks import TrainingRecipe

if TYPE_CHECKING:
    from ghnlib.reporting.statistics import Measured  # scipy.stats takes a second to import, trainings need none

SECTIONS = {name: field.annotation for name, field in params.Params.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, params.Section)}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """Parameters of a report; sections that it does not read are None.

    Attributes:
        stage: of the pipeline. profile, seed, processes, metrics and the sections: see params.yaml.
        device: where images and hypernetworks are, and so the networks; on a GPU ``processes`` is 1.
        variant, training_seed: the hypernetwork that the stage ``train`` trains, and with which seed.
        folder: where finished parts of the computation are kept.
        by_hand: run in Jupyter, not by the pipeline: then nothing that a stage depends on is written.
    """

    stage: str
    profile: str
    seed: int
    folder: Path
    processes: int = 1
    device: torch.device = torch.device("cpu")
    metrics: Sequence[str] = ("accuracy",)
    variant: str = ""
    training_seed: int | None = None
    by_hand: bool = False
    data: params.Data | None = None
    deepnets: params.DeepNets | None = None
    architectures: params.Architectures | None = None
    train: params.Train | None = None
    evaluate: params.Evaluate | None = None
    finetune: params.FineTune | None = None
    transfer: params.Transfer | None = None
    analysis: params.Analysis | None = None
    anytime: params.Anytime | None = None

    @classmethod
    def of(cls, stage: str, profile: str | None, **values: Any) -> Self:
        """From the plain values of a notebook's parameters cell.

        Without a profile the notebook is run by hand: the working folder becomes the one above that holds params.yaml,
        and the values are those of this file. Raises ParamsError if there is none, or it may not be read.
        """
        if profile is None:
            return cls._by_hand(stage, values)
        return cls(stage, profile, **_placed({name: _typed(name, value) for name, value in values.items()}))

    @classmethod
    def _by_hand(cls, stage: str, values: Mapping[str, Any]) -> Self:
        root = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "dvc.yaml").exists()), None)
        if root is None:
            raise ParamsError(f"no folder above {Path.cwd()} holds a pipeline: start Jupyter within the repository")
        os.chdir(root)
        read = validate(read_yaml("params.yaml"))
        own = _placed({name: getattr(read, name) for name in values if hasattr(read, name)})
        variant, seed = values.get("variant") or "", values.get("training_seed")
        folder = Path(".training", read.profile, _stage_name(stage, variant, seed))
        print(f"Run by hand with the values of {root / 'params.yaml'}: results are shown, files stay as they are.")
        return cls(stage, read.profile, folder=folder, variant=variant, training_seed=seed, by_hand=True, **own)

    @cached_property
    def images(self) -> ImageSplits:
        """Training, validation and test images."""
        return images_of(self.data, self.seed).to(self.device)

    def other_images(self, target: params.Target) -> ImageSplits:
        """Those of the section ``data`` with what a target changes of it."""
        data = self.data.model_copy(update=target.model_dump(exclude_unset=True))
        return images_of(data, self.seed).to(self.device)

    def differs(self, target: params.Target) -> bool:
        """Whether a target is another dataset: the same source at another resolution is none."""
        return (target.source, target.root) != (self.data.source, self.data.root)

    @property
    def augment(self) -> Augment:
        """Augmentation of training images."""
        return augmentation_of(self.data)

    def recipe(self, sgd: params.Sgd, steps: int) -> TrainingRecipe:
        """Training of a network from random initialisation."""
        return TrainingRecipe(steps, **sgd.model_dump(), augment=self.augment)

    @property
    def chance(self) -> float:
        """Accuracy (%) of guessing."""
        return 100 / len(self.images.classes)

    def split(self, name: str, size: int | None = None, images: ImageSplits | None = None) -> DeepNets:
        """Architectures of a split for the images (or others); ``size``: other than the profile's."""
        images = images or self.images
        return architectures_of(self.deepnets, name, images.side, len(images.classes), self.seed, size)

    @cached_property
    def hypernetworks(self) -> dict[str, dict[int, GHN]]:
        """The trained ones: variant -> seed of its training -> hypernetwork."""
        found: dict[str, dict[int, GHN]] = {}
        for name, (variant, seed) in self.train.trainings.items():
            found.setdefault(variant, {})[seed] = self.pretrained(f"models/{name}")
        return found

    def pretrained(self, folder: str | Path) -> GHN:
        """A hypernetwork that was trained, see ``GHN.from_pretrained``, on the device."""
        return GHN.from_pretrained(folder, map_location=self.device)

    @property
    def kept(self) -> dict[str, Any]:
        """Options of calls in processes whose results are kept, see ``map_kept``."""
        return {"processes": self.processes, "folder": self.folder}

    def validated(
        self, ghns: Mapping[str, GHN], architectures: Sequence[Architecture], score: str = "accuracy"
    ) -> pd.DataFrame:
        """Accuracy (percent, or another score) on validation images with predicted parameters: rows are architectures,
        columns hypernetworks."""
        found = {name: evaluate_predictions(ghn, architectures, self.images.val, **self.kept)[score]
                 for name, ghn in ghns.items()}  # fmt: skip
        return pd.DataFrame(found)

    def trainings_of(self, variants: Iterable[str]) -> dict[str, list[GHN]]:
        """Their hypernetworks, one a seed."""
        return {name: list(self.hypernetworks[name].values()) for name in variants}

    @property
    def analysed(self) -> list[str]:
        """The variants that the section ``analysis`` names; None there: all but those trained on one's own networks."""
        return list(self.analysis.variants or self.train.plain)

    @property
    def trainings(self) -> list[dict[str, GHN]]:
        """Their hypernetworks, by name, once for each seed of their training."""
        return [dict(zip(self.analysed, ghns)) for ghns in zip(*self.trainings_of(self.analysed).values())]

    def job(self, variant: str, seed: int, folder: Path, classes: tuple[int, ...] | None = None, **changes: Any) -> Job:
        """The training of a variant; ``changes``: of its recipe."""
        recipe, start = replace(self.train.recipe_of(variant), **changes), self.train.start_of(variant, seed)
        return Job(data=self.data, deepnets=self.deepnets, seed=self.seed, training_seed=seed, classes=classes,
                   ghn=architecture_of(start, self.train.stated(variant)) if start else self.train.config(variant),
                   recipe=recipe, folder=str(folder), device=self.device.type, start_from=start,
                   logger=self.train.logger)  # fmt: skip

    def history(self, variant: str) -> pd.DataFrame:
        """What the trainings of a variant have logged, see ``train_ghn``, one below the other; a column ``seed``."""
        logs = {seed: pd.read_csv(f"models/{training_name(variant, seed)}/history.csv") for seed in self.train.seeds}
        return pd.concat([log.assign(seed=seed) for seed, log in logs.items()], ignore_index=True)

    def publish(
        self,
        metrics: Mapping[str, Any],
        claims: "Mapping[str, Measured] | None" = None,
        tables: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        """Write the stage's metrics and claims (reports/PROFILE/metrics) and its tidy tables (results/NAME.csv).
        ``claims``: id of a claim (a key of claims.yaml, or "key/what it is of") -> what was measured."""
        if self.by_hand:
            return
        name = _stage_name(self.stage, self.variant, self.training_seed)
        path = Path("reports", self.profile, "metrics", f"{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"claims": claims} if claims else {}
        path.write_text(json.dumps(_without_nan({**metrics, **found}), indent=1, allow_nan=False) + "\n")
        for name, table in (tables or {}).items():
            Path("results").mkdir(exist_ok=True)
            table.to_csv(Path("results", f"{name}.csv"), index=False)

    def save_figure(self, figure, name: str) -> None:
        """Write a figure that is shown outside its notebook to reports/PROFILE/figures/NAME.png."""
        if self.by_hand:
            return
        path = Path("reports", self.profile, "figures", f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def training_name(variant: str, seed: int | None) -> str:
    """As in ``Train.trainings``; empty where there is no variant."""
    return f"{variant}-{seed}" if variant else ""


def _stage_name(stage: str, variant: str, seed: int | None) -> str:
    """Of the metrics and of the folder of what is kept: "evaluate", "train-ghn3-0"."""
    return "-".join(filter(None, (stage, training_name(variant, seed))))


def _placed(values: dict[str, Any]) -> dict[str, Any]:
    """With the device that ``device`` stands for. Networks on a GPU are one after another, in this process."""
    if "device" not in values:
        return values
    device = device_of(values["device"])
    return values | {"device": device} | ({} if device.type == "cpu" else {"processes": 1})


def _typed(name: str, value: Any) -> Any:
    if name in SECTIONS:
        return SECTIONS[name].of(value)
    return Path(value) if name == "folder" else value


def _without_nan(value: Any) -> Any:
    """Nested mappings, lists and named tuples without what is not a number, which JSON does not know; infinity (a
    crossover that never came) is None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _without_nan(v) for name, v in value.items() if not (isinstance(v, float) and isnan(v))}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and isinf(value) else value
