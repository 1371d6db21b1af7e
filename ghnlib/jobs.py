"""From sections of params.yaml to images, architectures and trained hypernetworks, in one or more processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import distributed

from ghnlib.architectures import Architecture
from ghnlib.config import GHNConfig, Recipe
from ghnlib.data import ImageSplits, load_images
from ghnlib.deepnets import DeepNets
from ghnlib.evaluation import evaluate_predictions
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, ImageSet
from ghnlib.processes import stop_with
from ghnlib.training import TrainingError, is_first_rank, share_of_rank, sum_over_ranks, train_ghn

KEPT_IN_MEMORY = 10_000
"""Training architectures of which graphs and modules are kept; beyond, each is sampled when its turn comes."""

TRAINING_IMAGES = ("source", "root", "image_size", "val_share", "test_share")
"""Keys of ``data`` that decide which images a training sees; the others decide on augmentation or test images."""


def images_of(data: Mapping, seed: int) -> ImageSplits:
    """Images of the ``data`` section."""
    keys = ("source", "root", "image_size", "val_share", "test_share", "test_per_class", "download")
    return load_images(**{key: data[key] for key in keys}, seed=seed)


def augmentation_of(data: Mapping) -> Augment:
    """Augmentation of the ``data`` section."""
    return Augment(shift=data["shift"], flip=data["flip"])


def architectures_of(
    deepnets: Mapping, split: str, images: ImageSplits, seed: int, widths: str | None = None
) -> DeepNets:
    """A split of the ``deepnets`` section, for the images' classes and size; ``widths``: see ``DeepNets``."""
    size = {"train": deepnets["train_pool"], "predefined": None}.get(split, deepnets.get(split, deepnets["ood"]))
    return DeepNets(
        split, seed, deepnets["scale"], num_classes=len(images.classes), input_size=images.side, size=size,
        widths=widths,
    )  # fmt: skip


def train_variant(job: Mapping) -> GHN:
    """Train one hypernetwork from plain values, on every rank; the first writes it to ``job["folder"]/model``.

    Args:
        job: ``data``, ``deepnets``, ``seed``; ``classes`` (indices of the classes to train on, None for all);
            ``ghn`` and ``recipe`` (fields of ``GHNConfig`` and ``Recipe``); ``folder``.
    """
    images, recipe = images_of(job["data"], job["seed"]), Recipe(**job["recipe"])
    if job["classes"] is not None:
        images = images.subset(job["classes"])
    pool = architectures_of(job["deepnets"], "train", images, job["seed"], recipe.widths)
    train = list(pool) if len(pool) <= KEPT_IN_MEMORY else pool
    val = list(architectures_of(job["deepnets"], "val", images, job["seed"]))
    torch.manual_seed(job["seed"])
    ghn = GHN(GHNConfig(**job["ghn"], num_classes=len(images.classes))).to(_device())
    train_images, val_images = images.train.to(_device()), images.val.to(_device())
    train_ghn(
        ghn, train, train_images, recipe, job["folder"], job["seed"], augmentation_of(job["data"]),
        validate=lambda ghn: {"validation_accuracy": validation_accuracy(ghn, val, val_images)},
        about={"data": {key: job["data"][key] for key in TRAINING_IMAGES}, "classes": job["classes"],
               "deepnets": {key: job["deepnets"][key] for key in ("scale", "train_pool")}},
    )  # fmt: skip
    if is_first_rank():
        ghn.save_pretrained(Path(job["folder"]) / "model")
    return ghn


def validation_accuracy(ghn: GHN, architectures: Sequence[Architecture], images: ImageSet) -> float:
    """Mean accuracy in percent with predicted parameters, the architectures shared out among ranks."""
    mine = share_of_rank(architectures, cost=lambda architecture: len(architecture.graph))
    return sum_over_ranks(evaluate_predictions(ghn, mine, images)["accuracy"].sum(), _device()) / len(architectures)


def train_in_processes(job: Mapping, devices: int) -> pd.DataFrame:
    """Run ``train_variant`` in a process of its own, or in one for each core (or GPU), which share every meta-batch.

    The training survives the caller: its checkpoints stay in ``job["folder"]``, and the same call resumes it. It writes
    ``job.json`` there; with that file, several nodes that share the folder train together by
    ``torchrun --nnodes=N --nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT -m ghnlib.jobs
    FOLDER/job.json`` on each.

    Returns:
        The history of ``train_ghn``.

    Raises:
        TrainingError: a process failed; the message is the last error of its output.
    """
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job, indent=1))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []
    command = [sys.executable, "-u", *launcher, "-m", "ghnlib.jobs", str(folder / "job.json")]
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
    return pd.read_csv(folder / "history.csv")


def _device() -> torch.device:
    """This rank's device. Raises TrainingError where a node has more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise TrainingError(f"there are {count} GPUs here, not {rank + 1} or more: lower train.devices")
    return torch.device("cuda", rank)


def _main(path: str) -> None:
    if parent := os.environ.get("GHNLIB_PARENT"):
        stop_with(int(parent))
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    if _device().type == "cuda":
        torch.cuda.set_device(_device())
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        train_variant(job)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1])
