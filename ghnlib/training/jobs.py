"""Trainings of hypernetworks as params.yaml describes them, in one or more processes."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import distributed

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import own_networks
from ghnlib.bounds import Count, Device, Logger, Seed
from ghnlib.config import GHNConfig, Recipe
from ghnlib.data.images import Augment, DataError, ImageSet
from ghnlib.data.sources import ImageSplits, augmentation_of, images_of
from ghnlib.deepnets.dataset import DeepNets, architectures_of
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import predicted_accuracies
from ghnlib.measuring.kept import map_kept
from ghnlib.params import Data
from ghnlib.params import DeepNets as DeepNetsSection
from ghnlib.processes import stop_with
from ghnlib.released.checkpoints import CheckpointError, locate, read_checkpoint
from ghnlib.training.checkpointing import TrainingError
from ghnlib.training.devices import device_of
from ghnlib.training.events import event_log
from ghnlib.training.loop import train_ghn
from ghnlib.training.ranks import is_first_rank, share_of_rank, sum_over_ranks
from ghnlib.variants import Section

KEPT_IN_MEMORY = 10_000
"""Training architectures of which graphs and modules are kept; beyond, each is sampled when its turn comes."""


class Job(Section):
    """One training. ``seed``: of splits of images and of architectures, ``training_seed``: of the rest; ``classes``:
    indices of the classes to train on, None for all; ``ghn``: its number of classes is that of the images;
    ``start_from``: a hypernetwork of this architecture whose training goes on, see ``GHN.from_pretrained``;
    ``logger``: "tensorboard" writes the history to ``folder/events`` too."""

    data: Data
    deepnets: DeepNetsSection
    seed: Seed
    training_seed: Seed
    classes: tuple[Count, ...] | None = None
    ghn: GHNConfig
    recipe: Recipe
    folder: str
    device: Device = "auto"
    start_from: str | None = None
    logger: Logger = "csv"


def train_job(job: Job) -> GHN:
    """Train one hypernetwork, on every rank; the first writes it to ``job.folder/model``. One thread: the order of sums
    does not depend on the machine."""
    torch.set_num_threads(1)
    images = images_of(job.data, job.seed).to(device_of(job.device))
    if job.classes is not None:
        images = images.subset(job.classes)
    splits = [architectures_of(job.deepnets, split, images.side, len(images.classes), job.seed,
                               widths=job.recipe.widths if split == "train" else None)
              for split in ("train", "val")]  # fmt: skip
    about = {"seed": job.seed, "classes": job.classes, "data": job.data.learnt_from}
    about["deepnets"] = job.deepnets.model_dump(include={"scale", "path", "train_pool"})
    if job.start_from is not None:
        with locate(job.start_from).open("rb") as file:
            about["start"] = hashlib.file_digest(file, "blake2b").hexdigest()
    extra = []
    if job.recipe.extra_share:
        extra, about["extra"] = own_networks(job.deepnets.extra, len(images.classes), images.side), job.deepnets.extra
    log = event_log(Path(job.folder, "events")) if job.logger == "tensorboard" else None
    augment = augmentation_of(job.data)
    return train_on(
        *splits, images, job.ghn, job.recipe, job.training_seed, job.folder, augment, about,
        start_from=job.start_from, extra=extra, log=log,
    )  # fmt: skip


def architecture_of(start_from: str, stated: Mapping[str, object]) -> GHNConfig:
    """The architecture of a hypernetwork to start from. ``stated``: fields of ``GHNConfig`` that it should have. Raises
    TrainingError if it has others, CheckpointError if it cannot be read."""
    config = GHNConfig(**read_checkpoint(locate(start_from))[0])
    if wrong := [key for key, value in stated.items() if getattr(config, key) != value]:
        theirs, ours = (", ".join(f"{key}={of(key)}" for key in wrong) for of in (config.__getattribute__, stated.get))
        raise TrainingError(f"start_from: {start_from} has {theirs}, the variant says {ours}: leave that out of it")
    return config


def train_on(
    pool: DeepNets,
    val: DeepNets,
    images: ImageSplits,
    config: GHNConfig,
    recipe: Recipe,
    seed: int,
    folder: str | Path,
    augment: Augment,
    about: Mapping[str, object] | None = None,
    start_from: str | None = None,
    extra: Sequence[Architecture] = (),
    log: Callable[[dict[str, float]], object] | None = None,
) -> GHN:
    """Train a hypernetwork on the architectures of ``pool``, validated on those of ``val``, on the images' device; it
    is written to ``folder/model``. ``config``: the number of classes is that of the images. ``about``: see
    ``train_ghn``, as for ``extra`` and ``log``. ``start_from``: see ``Job``."""
    train = list(pool) if len(pool) <= KEPT_IN_MEMORY else pool
    unseen = list(val)
    torch.manual_seed(seed)
    classes = len(images.classes)
    if start_from is None:
        ghn = GHN(replace(config, num_classes=classes))
    else:
        own = {key: value for key, value in asdict(config).items() if key != "num_classes"}
        ghn = GHN.from_pretrained(start_from, **own).for_classes(classes)
    ghn.to(images.device)
    train_ghn(
        ghn, train, images.train, recipe, folder, seed, augment,
        validate=lambda ghn: {"validation_accuracy": validation_accuracy(ghn, unseen, images.val)}, about=about,
        extra=extra, log=log,
    )  # fmt: skip
    if is_first_rank():
        ghn.save_pretrained(Path(folder) / "model")
    return ghn


def validation_accuracy(ghn: GHN, architectures: Sequence[Architecture], images: ImageSet) -> float:
    """Mean accuracy in percent with predicted parameters, the architectures shared out among ranks."""
    mine = share_of_rank(architectures, cost=lambda architecture: len(architecture.graph))
    scores = map_kept(predicted_accuracies, [(architecture,) for architecture in mine], (ghn, images))
    total = np.nansum([score["accuracy"] for score in scores])  # what diverged counts as 0
    return sum_over_ranks(total, images.device) / len(architectures)


def run_job(job: Job, devices: int) -> pd.DataFrame:
    """Run ``train_job`` here, or in a process for each of several cores (or GPUs), which share every meta-batch: no
    more of them than it has networks, others would be idle.

    Checkpoints stay in ``job.folder``, and the same call resumes a training that was killed. It writes ``job.json``
    there; with that file, whose folder counts, several nodes that share the folder train together by
    ``torchrun --nnodes=N --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m ghnlib.training.jobs
    FOLDER/job.json`` on each.

    Returns:
        The history of ``train_ghn``.

    Raises:
        TrainingError: see ``train_ghn``, or one of several processes failed; the message is the last error of its
            output.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(job.model_dump_json(indent=1))
    if (used := min(devices, job.recipe.meta_batch)) > 1:
        _share(folder, used)
    else:
        train_job(job)
    return pd.read_csv(folder / "history.csv")


def _share(folder: Path, devices: int) -> None:
    """Run the job of a folder in several processes of this node, whose output is passed on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    command = [sys.executable, "-u", *launcher, "-m", "ghnlib.training.jobs", str(folder / "job.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GHNLIB_PARENT": str(os.getpid())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        lines = []
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        reason = next((line for line in lines if re.match(r"\S*(\[rank\d\]: )?[\w.]*Error\b", line)), "see above")
        raise TrainingError(f"training in {folder} stopped: {reason.strip()}")


def _main(arguments: Sequence[str]) -> None:
    if parent := os.environ.get("GHNLIB_PARENT"):
        stop_with(int(parent))
    job = _read(*arguments)
    try:
        if (device := device_of(job.device)).type == "cuda":
            torch.cuda.set_device(device)
        if distributed.is_torchelastic_launched():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        train_job(job)
    except (CheckpointError, DataError, TrainingError) as error:  # their messages say all: without a traceback above
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _read(path: str = "job.json", *more: str) -> Job:
    """The job of a file, in whose folder it is run."""
    writes = "python -m ghnlib.pipeline.run job@VARIANT-SEED writes the job.json of a training and says where"
    if more:
        sys.exit(f"one argument is taken, FOLDER/job.json: {writes}")
    try:
        return Job.model_validate_json(Path(path).read_bytes()).model_copy(update={"folder": str(Path(path).parent)})
    except (OSError, ValidationError) as error:
        sys.exit(f"{path} is not the job of a training ({' '.join(str(error).split())[:500]}): {writes}")


if __name__ == "__main__":
    _main(sys.argv[1:])
