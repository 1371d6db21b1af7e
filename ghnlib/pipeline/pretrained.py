"""Puts a hypernetwork of a finished run among those that come with the package.

``python -m ghnlib.pipeline.pretrained NAME VARIANT [PROFILE]`` writes ghnlib/pretrained/NAME: of the variant's
trainings the one with the best accuracy on validation architectures and images, in half precision, and its model card.
"""

import json
import shutil
import sys
from pathlib import Path

import jinja2
import pandas as pd
from safetensors.torch import load_file, save_file

from ghnlib.params import Params
from ghnlib.params_file import ParamsError, read_yaml, validate
from ghnlib.pipeline.notebooks import write_text
from ghnlib.reporting.statistics import number_of

PRETRAINED = Path(__file__).parents[1] / "pretrained"
LARGEST = 8 * 10**6
"""Bytes of one, so that the package stays small."""

MEANS = ["trained on", "unseen"]
"""Of networks written by hand, in the metrics beside the networks themselves."""

CARD = """---
library_name: ghnlib
license: mit
tags: [graph-hypernetwork]
---

# {{ name }}: a graph hypernetwork for {{ classes }} classes

```python
ghn = ghnlib.GHN.from_pretrained("{{ name }}")
ghn.initialize(net, {{ side }})  # a network for {{ side }}x{{ side }} images of {{ classes }} classes
```

```
ghnlib predict --ghn {{ name }} --model ghnlib.architectures.handwritten.resnet --input-shape {{ side }} \\
    --out resnet.safetensors
```

- **Kind**: {{ config.encoder }}, d = {{ config.hid }}, {{ config.layers }} layers, largest tensor
  {{ config.max_shape | join(" x ") }}; {{ "{:,}".format(parameters) }} parameters, stored in half precision.
- **Data**: {{ data }}; {{ "{:,}".format(pool) }} training architectures of the scale *{{ scale }}*{{ own }}.
- **Recipe**: {{ "{:,}".format(recipe.steps) }} steps of {{ number_of(recipe.meta_batch, "architecture") }} and
  {{ recipe.batch_size }} images, {{ recipe.optimizer }}, rate {{ recipe.lr }}{{ start }}. Variant `{{ variant }}` of
  the profile `{{ profile }}`, training seed {{ seed }}{% if seeds | length == 1 %}, the only one{% else %}: of the
  seeds {{ seeds | join(", ") }} that with the best accuracy on validation architectures and images{% endif %}.
- **Licence**: MIT, as the package.
- **Limits**: it has learnt small networks on these images. Networks of other kinds, widths or input sizes may stay near
  chance, {{ "%.0f" | format(100 / classes) }}%; other classes need their own class layer.

Top-1 accuracy (%) on test images of architectures that no training saw, with predicted parameters and no training of
them (in single precision):

{{ table }}
{% if by_hand %}
Networks written by hand (ghnlib/architectures/handwritten.py), the same:

{{ by_hand }}
{% endif %}
{{ epoch.n }} of the test architectures after one epoch of SGD from random parameters:
{{ "%.1f" | format(epoch.mean) }}{% if epoch.n > 2 %} ± {{ "%.1f" | format(epoch.standard_error) }} (standard error
over architectures){% endif %}.
"""


def pack(name: str, variant: str, profile: str = "") -> Path:
    """Write ghnlib/pretrained/NAME from the run of a profile here (the default one without a name), and return it.

    Raises:
        ValueError: no such variant, or the hypernetwork is larger than a package should carry.
        OSError: the run is not finished.
    """
    run = Path("runs", profile) if profile else Path()
    params = validate(read_yaml(run / "params.yaml"))
    if variant not in params.train.variants:
        raise ValueError(f"no variant {variant!r} in {run / 'params.yaml'}: {', '.join(params.train.variants)}")
    seed = max(params.train.seeds, key=lambda seed: _validated(run, params.profile, variant, seed))
    model, target = run / "models" / f"{variant}-{seed}", PRETRAINED / name
    tensors = {key: value.half() for key, value in load_file(model / "model.safetensors").items()}
    size = sum(value.nbytes for value in tensors.values())
    if size > LARGEST:
        raise ValueError(f"{model} takes {size:,} bytes in half precision, at most {LARGEST:,} come with the package")
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors")
    shutil.copy(model / "config.json", target)
    accuracies = pd.read_csv(run / "results" / "evaluate.csv").query("method == @variant")
    parameters = sum(value.numel() for value in tensors.values())
    config = json.loads((target / "config.json").read_text())
    measured = json.loads((run / "reports" / params.profile / "metrics" / "evaluate.json").read_text())
    write_text(card(name, params, variant, seed, config, parameters, accuracies, measured), target / "README.md")
    return target


def _validated(run: Path, profile: str, variant: str, seed: int) -> float:
    """Accuracy (%) of a training on validation architectures and images at its end."""
    path = run / "reports" / profile / "metrics" / f"train-{variant}-{seed}.json"
    return json.loads(path.read_text())["validation_accuracy"]


def card(
    name: str, params: Params, variant: str, seed: int, config: dict, parameters: int, accuracies: pd.DataFrame,
    measured: dict,
) -> str:  # fmt: skip
    """The model card. ``accuracies``: rows ``split``, ``seed``, ``index``, ``top1`` (%) of the variant; ``measured``:
    the metrics of the stage ``evaluate``."""
    scores = accuracies.fillna({"top1": 0.0}).groupby(["split", "seed"], sort=False)["top1"].mean().unstack("seed")
    mean = f"mean of {scores.shape[1]} trainings" if scores.shape[1] > 1 else "this one"
    sizes = {"architectures": accuracies.groupby("split", sort=False)["index"].nunique()}
    table = pd.DataFrame(sizes | {"this one": scores[seed]} | {mean: scores.mean(axis=1)})
    data, extra, recipe = params.data, params.deepnets.extra, params.train.recipe_of(variant)
    share = recipe.extra_share
    own = f", and in a share of {share:g} of its steps {len(extra)} networks written by hand" if share else ""
    learnt = [network.rpartition(":")[2] for network in extra] if share else []
    by_hand = pd.DataFrame({mean: measured["own_networks"].get(variant, {})}).drop(MEANS, errors="ignore")
    by_hand.insert(0, "in its training", ["yes" if network in learnt else "no" for network in by_hand.index])
    source = Path(data.root).name if data.root else data.source
    start = params.train.start_of(variant, seed)
    start = f", going on from `{Path(start).as_posix().removeprefix('../../')}`" if start else ""
    return jinja2.Template(CARD, keep_trailing_newline=True).render(
        number_of=number_of, name=name, variant=variant, profile=params.profile, config=config, seed=seed,
        seeds=params.train.seeds, classes=config["num_classes"], side=data.image_size, parameters=parameters,
        table=table.to_markdown(floatfmt=("", ".0f", *[".1f"] * (len(table.columns) - 1))),
        by_hand=by_hand.to_markdown(floatfmt=".1f") if len(by_hand) else "",
        epoch=measured["accuracy"]["SGD, 1 epoch"]["test"], data=f"{source}, {data.image_size} pixels a side",
        pool=params.deepnets.train_pool, own=own, start=start, scale=params.deepnets.scale, recipe=recipe,
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        print(pack(*sys.argv[1:]))
    except (ParamsError, OSError, ValueError) as error:
        sys.exit(str(error))
