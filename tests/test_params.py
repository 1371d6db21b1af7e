import pytest
from shared import ROOT, params

from ghnlib.params_file import ParamsError, merge, read_merged, read_yaml, validate

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
        ("train.variants.GHN 9", {}, ["GHN 9", "pattern"]),
        ("train.variants", {}, ["train.variants", "{}", "at least 1"]),
        ("data.val_share", 1.5, ["data.val_share", "1.5", "less than 1"]),
        ("data.source", "mnist", ["data.source", "'mnist'", "'digits'", "'folder'"]),
        ("transfer.variant", "ghn4", ["transfer.variant", "'ghn4'", "mlp, ghn1"]),
        ("finetune.variants", ["ghn3", "ghn5"], ["finetune.variants", "'ghn5'", "mlp, ghn1"]),
        ("finetune", None, ["finetune", "None"]),
        ("finetune.lrs", {"sgd": [], "adamw": []}, ["finetune.lrs", "{'sgd': []", "at least 1"]),
        ("anytime.exits.chosen", 21, ["anytime.exits", "chosen = 21", "20 candidates", "at most all"]),
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


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "- 1\n", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match="broken.yaml"):
        read_yaml(path)


def test_overlays_merge_key_by_key(tmp_path):
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 0}
    overlay = tmp_path / "x.yaml"
    overlay.write_text("seed: 5\n")
    assert read_merged(ROOT / "params.yaml", overlay)["seed"] == 5


def test_an_overlay_extends_another(tmp_path):
    (tmp_path / "low.yaml").write_text("seed: 5\nprocesses: 3\n")
    (tmp_path / "high.yaml").write_text("extends: low\nseed: 6\n")
    merged = read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")
    assert (merged["seed"], merged["processes"]) == (6, 3) and "extends" not in merged
    for below in "lower", "high":
        (tmp_path / "high.yaml").write_text(f"extends: {below}\n")
        with pytest.raises(ParamsError, match=f"high.yaml: extends = '{below}'"):
            read_merged(ROOT / "params.yaml", tmp_path / "high.yaml")
