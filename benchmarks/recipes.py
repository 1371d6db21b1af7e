"""Tries a recipe: trains hypernetworks as params.yaml says but for some keys, and measures them on validation.

    python benchmarks/recipes.py ghn3 0,1,2 [KEY=VALUE ...]       such as train.recipe.clip=1.0 data.image_size=16

One training after the other, each on one core. Adds to recipes.csv, for each, the accuracy (%) on validation
architectures and images without training, of those with and without batch norm alone, and the processor seconds of the
training. The default recipe was chosen from these rows, one to three trainings each: they choose, they decide nothing.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time

os.environ["OMP_NUM_THREADS"] = "1"

import pandas as pd
from ruamel.yaml import YAML

from ghnlib.data.sources import images_of
from ghnlib.deepnets.dataset import architectures_of
from ghnlib.measuring.accuracy import predicted_accuracies
from ghnlib.params_file import read_yaml, validate
from ghnlib.training.jobs import Job, train_job

RESULTS = Path(__file__).with_suffix(".csv")


def main() -> None:
    """Train and measure a variant with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    values = read_yaml("params.yaml")
    for change in options.changes:
        keys, value = change.split("=", 1)
        *sections, key = keys.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = YAML(typ="safe", pure=True).load(value)  # as read_yaml: 1e-3 is a number
    for seed in options.seeds:
        row = {"variant": options.variant, "changes": " ".join(options.changes), "seed": seed}
        row |= measured(validate(values), options.variant, seed)
        print(row, flush=True)
        pd.DataFrame([row]).to_csv(RESULTS, mode="a", index=False, header=not RESULTS.exists())


def measured(params, variant: str, seed: int) -> dict[str, float]:
    """Accuracies of a training and its processor seconds."""
    images = images_of(params.data, params.seed)
    val = architectures_of(params.deepnets, "val", images.side, len(images.classes), params.seed)
    recipe = replace(params.train.recipe_of(variant), validate_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        started = process_time()
        job = Job(data=params.data, deepnets=params.deepnets, seed=params.seed, training_seed=seed, device="cpu",
                  ghn=params.train.config(variant), recipe=recipe, folder=folder)  # fmt: skip
        ghn = train_job(job)
        seconds = process_time() - started
    found = pd.Series([predicted_accuracies(a, ghn, images.val)["accuracy"] for a in val]).fillna(0)
    normed = pd.Series([a.norm is not None for a in val])
    means = {"accuracy": found.mean(), "with_norm": found[normed].mean(), "without_norm": found[~normed].mean()}
    return {name: round(value, 1) for name, value in means.items()} | {"seconds": round(seconds)}


if __name__ == "__main__":
    main()
