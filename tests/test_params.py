import json
import random
import re
import time

import pytest
from shared import ROOT, digits, params

from ghnlib.params_file import ParamsError, check_starts, merge, read_merged, read_yaml, validate
from ghnlib.variants import CONTINUED

PROFILES = sorted((ROOT / "profiles").glob("*.yaml"))


@pytest.fixture
def raw():
    return read_yaml(ROOT / "params.yaml")


def test_the_shipped_parameters_are_valid(raw):
    params = validate(raw)
    assert params.profile == "digits"
    assert {"mlp", "ghn1", "ghn2", "ghn3"} <= set(params.train.variants)


@pytest.mark.parametrize("overlay", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_valid_and_named_after_their_file(overlay):
    assert params(overlay.stem).profile == overlay.stem
    assert overlay.read_text().startswith("# ")


def test_a_variant_is_what_all_share_with_its_changes(raw):
    raw["train"]["variants"]["wide"] = {"hid": 64, "lr": 1e-4}
    train = validate(raw).train
    assert train.config("wide", 7).hid == 64 and train.config("wide", 7).num_classes == 7
    assert train.recipe_of("wide").lr == 1e-4 and train.recipe_of("wide").steps == raw["train"]["recipe"]["steps"]
    assert train.config("wide").layers == raw["train"]["ghn"]["layers"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sed", 1, ["sed", "1", "did you mean seed?", "allowed here: profile, seed"]),
        ("finetune.budgts", 5, ["finetune", "budgts", "5", "did you mean budgets?"]),
        ("train.variants.mlp.colour", "red", ["train.variants.mlp", "colour", "red", "allowed", "encoder", "lr"]),
        ("seed", "zero", ["seed", "'zero'", "integer"]),
        ("seed", True, ["seed", "True", "integer"]),
        ("data.flip", "false", ["data.flip", "'false'", "boolean"]),
        ("train.recipe.lr", "1e-3", ["train.recipe.lr", "'1e-3'", "number"]),
        ("train.recipe.lr", -1.0, ["train.recipe.lr", "-1.0", "greater than 0"]),
        ("train.recipe.lr", float("nan"), ["train.recipe.lr", "nan"]),
        ("train.recipe.betas", [0.9], ["train.recipe.betas"]),
        ("train.variants.ghn3.steps", 0, ["train.variants.ghn3.steps", "0", "greater than 0"]),
        ("train.variants.ghn3.encoder", "gnn", ["train.variants.ghn3.encoder = 'gnn'", "graphormer"]),
        ("train.variants.ghn3.hid", 30, ["train.variants.ghn3", "hid=30", "multiple of 4"]),
        (
            "train.variants.ghn3.stacked",
            True,
            ["variants.ghn3: stacked changes nothing with encoder=graphormer, only with"],
        ),
        ("train.variants.ghn3.rank", 8, ["rank changes nothing with decoder=conv, only with lowrank: leave it out"]),
        ("train.variants.ghn2.batching", "misaligned", ["batching changes nothing with encoder=gated_gnn"]),
        ("train.variants.ghn2.passing", False, ["passing changes nothing with stacked=False"]),
        ("train.variants.mlp.directions", "forward", ["directions changes nothing with encoder=mlp"]),
        ("train.variants.ghn1.fan", "out", ["fan changes nothing with weight_norm=False"]),
        ("train.variants.GHN 9", {}, ["GHN 9", "pattern"]),
        ("train.variants", {}, ["train.variants", "{}", "at least 1"]),
        ("data.val_share", 1.5, ["data.val_share", "1.5", "less than 1"]),
        ("data.source", "mnist", ["data.source", "'mnist'", "'digits'", "'folder'"]),
        ("transfer.variant", "ghn4", ["transfer.variant", "'ghn4'", "mlp, ghn1"]),
        ("finetune.variants", ["ghn3", "ghn5"], ["finetune.variants", "'ghn5'", "mlp, ghn1"]),
        ("metrics", ["auc", "accuracy"], ["metrics", "accuracy comes first"]),
        ("metrics", ["accuracy", "recall"], ["metrics", "'recall'", "'macro_f1'"]),
        ("finetune", None, ["finetune", "None"]),
        ("finetune.lrs", {"sgd": [], "adamw": []}, ["finetune.lrs", "{'sgd': []", "at least 1"]),
        ("anytime.exits.chosen", 21, ["anytime.exits", "chosen = 21", "20 candidates", "at most all"]),
        ("deepnets.test", 10**30, ["deepnets.test", "less than or equal to 10000000"]),
        ("train.recipe.steps", 10**30, ["train.recipe.steps", "100000000"]),
        ("train.variants.ghn1.meta_batch", 401, ["train.variants.ghn1: meta_batch = 401", "at most 400"]),
        ("train.variants.ghn2.architectures", 401, ["train.variants.ghn2: architectures = 401: at most 400"]),
        ("anytime.variants.vanilla.meta_batch", 61, ["anytime.variants.vanilla: meta_batch = 61", "at most 60"]),
        ("deepnets.extra", ["My Net"], ["deepnets.extra", "'My Net'", "pattern"]),
        ("anytime.recipe.extra_share", 0.5, ["anytime.variants.vanilla: extra_share = 0.5: must be 0"]),
        ("train.seeds", [0, 1, 0], ["train.seeds", "only once"]),
        ("train.devices", 2, ["train.devices = 2: at most 1", "share a meta-batch"]),
        ("train.seeds", list(range(101)), ["train.seeds", "at most 100"]),
        ("train.variants.null", {}, ["train.variants.null", "something else"]),
        ("train.variants.evaluate", {}, ["train.variants.evaluate", "something else"]),
        ("train.variants.ghn3-orth", {}, ["train.variants.ghn3-orth", "something else"]),
        ("train.variants.a/b", {}, ["train.variants.a/b", "pattern"]),
        ("anytime.search.second.size", 8, ["unknown key anytime.search.second.size", "allowed here: source, root"]),
        (
            "transfer.targets",
            {"a": {"source": "digits", "root": None, "image_size": 8, "sise": 8}},
            ["unknown key transfer.targets.a.sise", "image_size"],
        ),
        ("evaluate.batch_size", 1, ["evaluate.batch_size = 1", "greater than or equal to 2"]),
        ("evaluate.sgd.batch_size", 1080, ["evaluate.sgd.batch_size = 1080: at most 1079", "epoch"]),
        ("data.val_share", 0.99, ["val_share", "at most 0.98", "two images of each digit"]),
        ("data.test_per_class", 36, ["data.test_per_class = 36: at most 35"]),
        ("data.image_size", 257, ["data.image_size = 257: at most 256"]),
        ("data.source", "cifar10", ["data.root = None: the source cifar10 needs the folder"]),
        ("transfer.per_class", 105, ["transfer.per_class = 105: at most 104"]),
        ("transfer.source_classes", 10, ["transfer.source_classes = 10: at most 9", "10 classes"]),
        ("transfer.detection.backbones", [100], ["transfer.detection.backbones = 100: at most 99"]),
        ("transfer.detection.batch_size", 23, ["transfer.detection.batch_size = 23: at most 22"]),
    ],
)
def test_what_is_not_allowed_is_named(raw, key, value, said):
    section, *path = raw, *key.split(".", key.count(".") if "GHN 9" not in key else 2)
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    with pytest.raises(ParamsError) as error:
        validate(raw)
    assert all(text in str(error.value) for text in said), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_networks_to_draw_a_share_from_must_be_named(raw):
    raw["deepnets"]["extra"], raw["train"]["variants"]["ghn3"]["extra_share"] = [], 0.4
    with pytest.raises(ParamsError, match="extra_share = 0.4: must be 0, deepnets.extra names no"):
        validate(raw)


def test_a_variant_that_starts_from_a_hypernetwork_has_a_lower_rate_and_its_file_must_be_there(
    raw, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    raw["train"]["seeds"] = [0, 3]
    raw["train"]["variants"] |= {
        "on": {"start_from": "models/a-{seed}", "hid": 20},
        "own": {"start_from": "a/b", "lr": 1.0},
    }
    params = validate(raw)
    train, recipe = params.train, params.train.recipe
    assert (train.start_of("on", 3), train.start_of("ghn3", 3)) == ("models/a-3", None)
    assert (train.recipe_of("on").lr, train.recipe_of("own").lr) == (CONTINUED * recipe.lr, 1.0)
    (tmp_path / "models" / "a-0").mkdir(parents=True)
    check_starts(params, ["on-0", "own-3", "ghn3-0"])
    with pytest.raises(ParamsError, match=r"train.variants.on.start_from = 'models/a-3': there is no such.*hub id"):
        check_starts(params, train.trainings)
    for start in "models/ghn3-{seed}", str(tmp_path / "models" / "ghn3-0" / "model.safetensors"):
        raw["train"]["variants"]["on"]["start_from"] = start
        with pytest.raises(
            ParamsError, match=r"train.variants.on.start_from = '.*models/ghn3-0.*': this run trains it"
        ):
            check_starts(validate(raw), train.trainings)


def test_limits_are_those_of_the_embedded_digits(raw):
    splits = digits(val_share=0.9, test_share=0.3)
    trained, tested = splits.train.labels.bincount(), splits.test.labels.bincount()
    raw["data"] |= {"val_share": 0.9, "test_share": 0.3, "test_per_class": 180}
    raw["transfer"]["per_class"], raw["evaluate"]["sgd"]["batch_size"] = 180, 2000
    with pytest.raises(ParamsError) as error:
        validate(raw)
    limits = tested.min(), trained.min(), trained.sum()
    assert re.findall(r"at most (\d+)", str(error.value)) == [str(int(limit)) for limit in limits]


def test_reading_images_in_another_way_makes_no_other_training(raw):
    data = validate(raw).data
    same, other = (data.model_copy(update=change) for change in ({"resident_gib": 0.5}, {"image_size": 16}))
    assert same.learnt_from == data.learnt_from != other.learnt_from


def test_a_value_of_none_of_several_kinds_is_named_by_its_key_alone(raw):
    raw["transfer"]["detection"]["backbones"], raw["analysis"]["svr"]["gamma"] = [1, 0.5], [1.0, "much"]
    with pytest.raises(ParamsError) as error:
        validate(raw)
    keys = {line.partition(" = ")[0].partition(": ")[2] for line in str(error.value).splitlines()}
    assert keys == {"transfer.detection.backbones.1", "analysis.svr.gamma.1"}


def test_a_missing_key_is_named(raw):
    del raw["evaluate"]["epochs"]
    with pytest.raises(ParamsError, match="evaluate.epochs: this key is missing"):
        validate(raw)


def test_parameters_are_frozen(raw):
    with pytest.raises(ValueError, match="frozen"):
        validate(raw).seed = 3


def test_numbers_are_read_as_dvc_reads_them(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("a: 1e-3\nb: yes\nc: 010\n")
    assert read_yaml(path) == {"a": 1e-3, "b": "yes", "c": 10}


LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: 1\na: 2\n", "a: {b: 1, b: 1}", "- 1\n", "", "1: 2", "a: 2024-02-30", "a: 2024-01-01", "a: !!set {b}",
     "a: !!omap [b: 1, b: 2]", f"a: {'1' * 5000}", "a: &a [*a]", "[" * 2000, f"a: {'b' * 300_000}", LAUGHS, MERGES],
    ids=range(16),
)  # fmt: skip
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match="broken.yaml"):
        read_yaml(path)


def test_overlays_merge_key_by_key(tmp_path):
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 0}
    overlay = tmp_path / "x.yaml"
    overlay.write_text("seed: 5\n")
    assert read_merged(ROOT / "params.yaml", overlay)["seed"] == 5


def test_an_overlay_leaves_out_variants(tmp_path):
    (tmp_path / "low.yaml").write_text("train: {variants: {new: {}, newer: {}}}\n")
    (tmp_path / "high.yaml").write_text("extends: low\ntrain: {variants: {ghn1: null, new: null}}\n")
    variants = read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")["train"]["variants"]
    assert list(variants) == ["mlp", "ghn2", "ghn3", "newer"]


def test_an_overlay_extends_another(tmp_path):
    (tmp_path / "low.yaml").write_text("seed: 5\nprocesses: 3\n")
    (tmp_path / "high.yaml").write_text("extends: low\nseed: 6\n")
    merged = read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")
    assert (merged["seed"], merged["processes"]) == (6, 3) and "extends" not in merged
    for below in "lower", "high", "../high", [1]:
        (tmp_path / "high.yaml").write_text(f"extends: {below}\n")
        with pytest.raises(ParamsError, match=re.escape(f"high.yaml: extends = {below!r}")):
            read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")
    (tmp_path / "high.yaml").write_text("extends: low\n")
    (tmp_path / "low.yaml").write_text("extends: high\n")
    with pytest.raises(ParamsError, match="low.yaml: extends = 'high'"):
        read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")


HUGE = 10**30
WRONG = (HUGE, -1, 0, 1, 0.5, 1e308, float("nan"), float("inf"), None, True, "x", "\0", "1e3", [], {}, [[]], [HUGE], {"x": HUGE},
         ["a", "a"], [0, 0], "9" * 10_000)  # fmt: skip


def places(value, path=()):
    """Paths of all values within one."""
    yield from [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(raw, path, value):
    copy = json.loads(json.dumps(raw))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def accepted(read):
    """Whether parameters may be used; what is refused has messages, of one line each, within a second."""
    started = time.monotonic()
    try:
        read()
        return True
    except ParamsError as error:
        lines = str(error).splitlines()
        assert lines and max(map(len, lines)) < 2500
        return False
    finally:
        assert time.monotonic() - started < 5


@pytest.mark.slow
def test_wrong_values_in_every_place_are_clear_errors_or_none(raw):
    counts = {True: 0, False: 0}
    for path in places(raw):
        for value in WRONG:
            found = accepted(lambda path=path, value=value: validate(replaced(raw, path, value)))
            counts[found] += 1
            assert not (found and str(HUGE) in str(value)), (path, value)
    print(counts)
    assert counts[False] > 4 * counts[True]


@pytest.mark.slow
def test_damaged_files_are_clear_errors_or_none(tmp_path):
    text, draw, path = (ROOT / "params.yaml").read_text(), random.Random(0), tmp_path / "params.yaml"
    counts = {True: 0, False: 0}
    for _ in range(400):
        at, length = draw.randrange(len(text)), draw.choice((1, 3, 20, 500))
        other = draw.choice(
            ("", "\t", "\0", "\udcff", ": ", "- ", "[", "}", "&a ", "*a", "!!set ", "%", "'", "\n", "  ", "9" * 40)
        )
        path.write_text(text[:at] + other + text[at + length :], errors="surrogateescape")
        counts[accepted(lambda: validate(read_yaml(path)))] += 1
    print(counts)
    assert counts[False] > counts[True]
