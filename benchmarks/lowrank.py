"""Tiling beside the low-rank decoder: hypernetworks of as many parameters, trained for as many steps.

    python benchmarks/lowrank.py [--steps 1500] [--seeds 0 1] [--folder FOLDER]

GHN-3 with the data and the recipe of params.yaml: "tiled" as there, "tiled, framework" from torch's own initialisation
as the papers, "lowrank" with tensors up to 256 channels and the rank that makes the numbers of parameters equal.
Started again with the same folder, trainings go on where they were. Prints one row a decoder, means over seeds:

- test, wide: accuracy (%) of unseen architectures without training of them, of 30 ordinary and 20 wide ones;
- alike: pairs (%) of a convolution's output channels in wide networks that are equal;
- rank: effective rank (exponential of the entropy of its singular values) of a 64 x 64 or larger weight's matrix, as a
  share of its shorter side;
- MiB: that a prediction of the widest of these networks keeps for its backward pass, beside the hypernetwork;
- ms: processor time of a training step.

After 1000 steps (two seeds tiled, one of the others): tiled 66% and 68% on test and wide, tiled, framework
37% and 37%, lowrank 15% and 14%, with no equal channels but an effective rank of 0.03 (0.40, 0.32): so few steps, of a
recipe that was tuned for tiling, do not train it. A prediction keeps 3.5 MiB (2.6), a step takes 53 ms (45).
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from time import process_time

os.environ["OMP_NUM_THREADS"] = "1"

import pandas as pd
import torch

from ghnlib import GHN
from ghnlib.data.sources import augmentation_of, images_of
from ghnlib.deepnets.dataset import architectures_of
from ghnlib.measuring.accuracy import predicted_accuracies
from ghnlib.params_file import read_yaml, validate
from ghnlib.training.jobs import train_on
from ghnlib.training.memory import saved_bytes

DECODERS = {
    "tiled": {},
    "lowrank": {"decoder": "lowrank", "rank": 36, "max_shape": (256, 256, 11, 11), "initialization": "framework"},
    "tiled, framework": {"initialization": "framework"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path(".training/lowrank"))
    options = parser.parse_args()
    params = validate(read_yaml("params.yaml"))
    images = images_of(params.data, params.seed)
    splits = {split: architectures_of(params.deepnets, split, images.side, len(images.classes), params.seed)
              for split in ("train", "val", "test", "wide")}  # fmt: skip
    recipe = replace(params.train.recipe_of("ghn3"), steps=options.steps, validate_every=10**6)
    rows = []
    for name, changes in DECODERS.items():
        config = replace(params.train.config("ghn3"), **changes)
        for seed in options.seeds:
            folder = options.folder / f"{name}-{options.steps}-{seed}"
            ghn, milliseconds = trained(splits, images, config, recipe, seed, folder, augmentation_of(params.data))
            rows.append({"decoder": name, "parameters": sum(p.numel() for p in ghn.parameters()),
                         **measured(ghn, splits, images), "ms": milliseconds})  # fmt: skip
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).groupby("decoder", sort=False).mean().round(2).to_string())


def trained(splits, images, config, recipe, seed: int, folder: Path, augment) -> tuple[GHN, float]:
    """A hypernetwork and the milliseconds of a step, which are those of the steps made now (NaN: none)."""
    if (folder / "model").exists():
        return GHN.from_pretrained(folder / "model"), float("nan")
    started = process_time()
    ghn = train_on(splits["train"], splits["val"], images, config, recipe, seed, folder, augment)
    return ghn, 1000 * (process_time() - started) / recipe.steps


def measured(ghn: GHN, splits, images) -> dict[str, float]:
    of = {split: list(splits[split])[:count] for split, count in (("test", 30), ("wide", 20))}
    found = {split: pd.Series([predicted_accuracies(a, ghn, images.test)["accuracy"] for a in members]).fillna(0).mean()
             for split, members in of.items()}  # fmt: skip
    with torch.no_grad():
        matrices = [value.flatten(1) for a in of["wide"] for value in ghn.predict(a.graph).values() if value.ndim == 4]
    matrices = [matrix for matrix in matrices if matrix.shape[1] > 1]
    large = [matrix for matrix in matrices if min(matrix.shape) >= 64]
    widest = max(of["wide"], key=lambda architecture: architecture.num_params)
    own = sum(p.numel() * p.element_size() for p in ghn.parameters())
    return found | {
        "alike": 100 * pd.Series([equal_pairs(matrix) for matrix in matrices]).mean(),
        "rank": pd.Series([effective_rank(matrix) / min(matrix.shape) for matrix in large]).mean(),
        "MiB": (saved_bytes(lambda: ghn.predict(widest.graph)) - own) / 2**20,
    }


def equal_pairs(matrix: torch.Tensor) -> float:
    """Share of the pairs of rows that are equal."""
    distinct, counts = matrix.unique(dim=0, return_counts=True)
    pairs = len(matrix) * (len(matrix) - 1)
    return float((counts * (counts - 1)).sum() / pairs) if pairs else 0.0


def effective_rank(matrix: torch.Tensor) -> float:
    """Of Roy and Vetterli (2007)."""
    values = torch.linalg.svdvals(matrix)
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


if __name__ == "__main__":
    main()
