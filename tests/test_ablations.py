"""The rows of the papers' ablation tables are variants of profiles, of the published size or that of digits."""

import pytest
import torch
from shared import params

from ghnlib import GHN
from ghnlib.experiments.evaluate.ablations import bases, changes, options_of
from ghnlib.reporting.publish import published

CLASSES = {"cifar10": 10, "imagenet": 1000}
PUBLISHED = [
    ("cifar10", "ghn2", "1.6 M"),
    ("cifar10", "ghn2-1000-architectures", "1.6 M"),
    ("cifar10", "ghn2-100-architectures", "1.6 M"),
    ("cifar10", "ghn2-no-normalization", "1.6 M"),
    ("cifar10", "ghn2-no-virtual-edges", "1.6 M"),
    ("cifar10", "ghn2-no-layernorm", "1.6 M"),
    ("cifar10", "mlp", "1.6 M"),
    ("cifar10", "ghn2-m1-long", "1.6 M"),
    ("cifar10", "ghn2-m1", "1.6 M"),
    ("cifar10", "ghn2-m1-no-shape-encoding", "1.6 M"),
    ("cifar10", "ghn2-m1-no-virtual-edges", "1.6 M"),
    ("cifar10", "ghn2-m1-stacked-no-virtual-edges", "1.6 M"),
    ("cifar10", "ghn2-m1-stacked", "1.6 M"),
    ("cifar10", "ghn2-m1-forward", "1.6 M"),
    ("cifar10", "ghn2-m1-t5", "1.6 M"),
    ("cifar10", "ghn2-m1-fan-out", "1.6 M"),
    ("cifar10", "ghn2-m1-mlp-decoder", "32 M"),
    ("cifar10", "ghn2-m1-no-tiling", "135 M"),
    ("cifar10", "ghn2-m1-no-tiling-mlp-decoder", "4.1 B"),
    ("cifar10", "ghn1", "1.6 M"),
    ("cifar10", "ghn1-layernorm", "1.6 M"),
    ("imagenet", "ghn2", "2.32 M"),
    ("imagenet", "ghn2-retrained", "2.32 M"),
    ("imagenet", "ghn3-d32", "2.37 M"),
    ("imagenet", "ghn3-no-centrality", "6.89 M"),
    ("imagenet", "ghn3-no-input-distance", "6.84 M"),
    ("imagenet", "ghn3", "6.91 M"),
    ("imagenet", "ghn3-no-edges", "6.88 M"),
    ("imagenet", "ghn3-no-embeddings", "6.80 M"),
    ("imagenet", "ghn2-d128", "34.73 M"),
    ("imagenet", "ghn3-decoder-4d", "38.86 M"),
    ("imagenet", "ghn3-s", "35.81 M"),
    ("imagenet", "ghn3-xl-m16", "654.37 M"),
    ("imagenet", "ghn3-l", "214.7 M"),
    ("imagenet", "ghn3-m16", "6.91 M"),
    ("imagenet", "ghn3-s-m16", "35.81 M"),
    ("imagenet", "ghn3-l-m16", "214.7 M"),
    ("imagenet", "ghn3-xl", "654.37 M"),
    ("imagenet", "ghn3-squared-penalty", "6.91 M"),
    ("imagenet", "ghn3-no-penalty", "6.91 M"),
    ("imagenet", "ghn3-forward", "6.90 M"),
    ("imagenet", "ghn3-no-attention", "6.74 M"),
    ("imagenet", "ghn3-no-penalty-decay-1e-1", "6.91 M"),
    ("imagenet", "ghn3-no-penalty-decay-3e-1", "6.91 M"),
    ("imagenet", "ghn3-gamma-1e-4", "6.91 M"),
    ("imagenet", "ghn3-misaligned", "6.91 M"),
]  # PPUDA Table 8; GHN-3 Tables 1, 2, 5, 10 and 11


def count(profile, name):
    with torch.device("meta"):
        ghn = GHN(params(f"ablations-{profile}").train.config(name, CLASSES[profile]))
    return sum(p.numel() for p in ghn.parameters())


@pytest.mark.parametrize(("profile", "name", "published"), PUBLISHED)
def test_rows_have_the_published_number_of_parameters(profile, name, published):
    number, unit = published.split()
    digits = len(number.partition(".")[2])
    assert f"{count(profile, name) / {'M': 1e6, 'B': 1e9}[unit]:.{digits}f}" == number


def test_ghn2_s_shares_the_weights_of_its_sweeps():
    """Published: 35.0 M. Both sweeps share their weights; with two sets it would be 34,863,536, with three 34,995,760."""
    assert count("imagenet", "ghn2-s") == 34_731_312


@pytest.mark.parametrize(("profile", "others"), [("cifar10", {"ghn3"}), ("imagenet", {"mlp", "ghn1", "ghn2-s"})])
def test_variants_are_rows_and_differ(profile, others):
    train = params(f"ablations-{profile}").train
    assert set(train.variants) == {name for data, name, _ in PUBLISHED if data == profile} | others
    rows = [(train.config(name), train.recipe_of(name)) for name in train.variants]
    assert len(set(rows)) == len(rows)


def test_a_row_is_its_base_with_the_changes_of_the_table():
    train = params("ablations-cifar10").train
    base, row = train.recipe_of("ghn2"), train.recipe_of("ghn2-m1")
    assert (base.meta_batch, row.meta_batch) == (8, 1) and base.lr == row.lr == 1e-3
    assert train.recipe_of("ghn2-m1-long").steps == 8 * base.steps
    assert train.config("ghn2-m1-stacked").stacked and not train.config("ghn2-m1").stacked


ROWS = {
    "mlp": {"encoder": "mlp"},
    "ghn1-layernorm": {"layernorm": True},
    "ghn2-100-architectures": {"architectures": 100},
    "ghn2-20-architectures": {"architectures": 20},
    "ghn2-no-virtual-edges": {"virtual_edges": False},
    "ghn2-no-layernorm": {"layernorm": False},
    "ghn2-no-shape-encoding": {"shape_encoding": False},
    "ghn2-forward": {"directions": "forward"},
    "ghn2-t5": {"layers": 5},
    "ghn2-stacked": {"stacked": True},
    "ghn2-fan-out": {"fan": "out"},
    "ghn2-mlp-decoder": {"decoder": "mlp"},
    "ghn2-framework": {"initialization": "framework"},
    "ghn2-framework-no-normalization": {"weight_norm": False},
    "ghn3-no-penalty": {"gamma": 0.0},
    "ghn3-squared-penalty": {"penalty": "squared"},
    "ghn3-no-centrality": {"centrality": False},
    "ghn3-no-input-distance": {"input_distance": False},
    "ghn3-no-edges": {"directions": "none"},
    "ghn3-forward": {"directions": "forward"},
    "ghn3-no-attention": {"attention": False},
    "ghn3-m4": {"meta_batch": 4, "steps": 750},
    "ghn3-m4-misaligned": {"batching": "misaligned"},
}


def test_rows_on_digits_differ_from_their_base_in_what_the_tables_say():
    train = params("ablations").train
    options, base = options_of(train), bases(train)
    assert {name: changes(options[name], options[base[name]]) for name in base} == ROWS
    assert set(train.variants) == ROWS.keys() | {"ghn1", "ghn2", "ghn3"} and len(train.seeds) == 3


def test_batches_of_the_released_code_are_tried_at_two_lengths():
    shorter, longer = (options_of(params(profile).train) for profile in ("ablations", "batching"))
    assert bases(params("batching").train) == {"ghn3-m4-misaligned": "ghn3-m4"}
    assert {name: changes(options, shorter[name]) for name, options in longer.items()} == {
        name: {"steps": 2250} for name in ("ghn3-m4", "ghn3-m4-misaligned")
    }


def test_bases_on_digits_are_the_variants_of_the_default_profile():
    own, default = options_of(params("ablations").train), options_of(params().train)
    assert all(own[name] == default[name] for name in ("ghn1", "ghn2", "ghn3"))


def test_published_rows_are_variants_of_the_profiles_with_such_rows():
    profiles = "ablations", "ablations-cifar10", "ablations-imagenet"
    assert set(published("evaluate/ablations").index) <= {name for p in profiles for name in params(p).train.variants}
