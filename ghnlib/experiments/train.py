"""The report on the training of one hypernetwork."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ghnlib.experiments.setup import SECTIONS, Setup, training_name
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.params_file import read_yaml, validate
from ghnlib.training.jobs import run_job


class Training(NamedTuple):
    """A trained hypernetwork and its history, see ``train_ghn``."""

    ghn: GHN
    history: pd.DataFrame

    @property
    def validated(self) -> pd.DataFrame:
        """The rows of the history with a validation."""
        return self.history.dropna(subset="validation_accuracy")

    @property
    def parameters(self) -> int:
        """Of the hypernetwork."""
        return sum(p.numel() for p in self.ghn.parameters())


def train_variant(setup: Setup) -> Training:
    """Train the setup's variant, or resume that; the outcome is moved to models/VARIANT-SEED.

    By hand, a hypernetwork that the pipeline has trained is shown instead; one that it has not is trained in the
    stage's folder, from which the pipeline resumes.
    """
    name = training_name(setup.variant, setup.training_seed)
    target, job = Path("models", name), setup.job(setup.variant, setup.training_seed, setup.folder)
    if setup.by_hand and target.exists():
        print(f"{target} is there: it is shown, not trained. `dvc repro --force train@{name}` trains it anew.")
    else:
        run_job(job, setup.train.devices)
        if setup.by_hand:
            target = setup.folder / "model"
        else:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(setup.folder / "model", target)
        shutil.copy(setup.folder / "history.csv", target)
    return Training(GHN.from_pretrained(target), pd.read_csv(target / "history.csv"))


def write_job(training: str) -> Path:
    """Write the ``job.json`` of a training ("ghn3-0") of params.yaml to the folder of its stage, see ``run_job``."""
    params = validate(read_yaml("params.yaml"))
    folder = Path(".training", params.profile, f"train-{training}")
    own = {name: getattr(params, name) for name in SECTIONS}
    setup = Setup("train", params.profile, params.seed, folder, **own)
    job = setup.job(*params.train.trainings[training], folder).model_copy(update={"device": params.device})
    (folder / "job.json").write_text(job.model_dump_json(indent=1))
    return folder / "job.json"


if __name__ == "__main__":
    print(write_job(sys.argv[1]))
