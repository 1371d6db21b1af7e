import json
import subprocess
import sys
from pathlib import Path

import pytest

from ghnlib.params_file import ParamsError, read_yaml, validate
from ghnlib.pipeline import profiles as pipeline

ROOT = Path(__file__).parents[2]
MEET = "touch {me}.there; for i in $(seq 300); do test -e {other}.there && exit 0; sleep 0.1; done; exit 1"


@pytest.fixture(scope="module")
def params():
    return validate(read_yaml(ROOT / "params.yaml"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A DVC folder whose stages are to be written by the test: name -> command."""
    monkeypatch.setattr(pipeline.signal, "signal", lambda *_: None)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(pipeline.CONFIG)

    def write(commands, groups):
        monkeypatch.setattr(pipeline, "independent_stages", lambda params: groups)
        stages = "".join(f"  {name}: {{cmd: '{command}'}}\n" for name, command in commands.items())
        (tmp_path / "dvc.yaml").write_text(f"stages:\n{stages}")
        return tmp_path

    return write


def test_independent_stages_run_side_by_side(folder, params, capfd):
    meet = {me: MEET.format(me=me, other=other) for me, other in ("ab", "ba")}
    root = folder(meet | {"last": "echo done > last.out"}, (["a", "b"],))
    assert pipeline.reproduce(root, params) == (0, 3, 3)
    assert (root / "last.out").exists()
    told = capfd.readouterr().out
    assert "a: done in" in told and "b: done in" in told and "last" not in told
    assert "Running stage" not in told and "dvc push" not in told and "3 of 3 stages\n" in told


def test_what_a_failing_stage_says_is_shown(folder, params, capfd):
    assert pipeline.reproduce(folder({"a": "echo because >&2; exit 3"}, (["a"],)), params)[0] != 0
    told = capfd.readouterr().out
    assert "a: because" in told and "a: ERROR: failed to reproduce" in told and "done in" not in told


def test_a_finished_run_leaves_where_its_numbers_come_from(folder, monkeypatch, capfd):
    root = folder({"a": "echo done"}, (["a"],))
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(root)
    assert pipeline.main([]) == 0
    found = json.loads((root / "reports" / "digits" / "provenance.json").read_text())
    assert found["stages_run"] == "2 of 2" and found["seconds"] >= 1 and found["commit"] is None
    assert "Your results: reports/digits" in capfd.readouterr().out


def test_seconds_of_an_earlier_run_are_known_by_the_names_of_stages(tmp_path, params):
    assert pipeline.seconds_of_stages(tmp_path, params) == {}
    (tmp_path / "reports" / "digits").mkdir(parents=True)
    (tmp_path / "reports" / "digits" / "timing.json").write_text('{"evaluate": 3.0, "train-ghn3-0": 2.0}')
    assert pipeline.seconds_of_stages(tmp_path, params) == {"evaluate": 3.0, "train@ghn3-0": 2.0}


def test_after_a_failure_nothing_is_started(folder, params):
    root = folder({"a": "exit 3", "b": "touch b.out"}, (["a"], ["b"]))
    assert pipeline.reproduce(root, params)[0] != 0
    assert not (root / "b.out").exists()


def test_independent_stages_are_stages_of_the_pipeline(params):
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {stage for group in pipeline.independent_stages(params) for stage in group} == set(known) - {"claims"}


def test_trainings_depend_on_the_keys_that_they_read_alone(params):
    named = read_yaml(ROOT / "dvc.yaml")["stages"]["train"]["params"]
    for section, unread in ("data", {"test_per_class", "download"}), ("deepnets", {"test", "ood"}):
        keys = {key.partition(".")[2] for key in named if key.partition(".")[0] == section}
        assert keys == set(type(getattr(params, section)).model_fields) - unread


@pytest.mark.parametrize("names", [["tony"], ["tiny", "digits-long"]])
def test_unknown_profiles_are_refused(names):
    with pytest.raises(ParamsError, match="there are .*cifar10-small"):
        pipeline.run_folder(ROOT, *names)


def prepared(root, profile):
    """The run folder of a profile in a tree like this one, and its parameters."""
    for name in "ghnlib", "notebooks", "profiles", "params.yaml", "dvc.yaml", "requirements.lock":
        (root / name).symlink_to(ROOT / name)
    folder = pipeline.run_folder(root, profile)
    folder.mkdir(parents=True)
    pipeline.prepare(root, folder)
    return folder, read_yaml(folder / "params.yaml")


def test_what_a_training_starts_from_is_seen_from_the_folder_of_a_profile_unless_it_is_on_the_hub(tmp_path):
    root, starts = tmp_path, {"a": "models/ghn3-{seed}", "b": "someone/ghn", "c": "ghn3tm8.pt", "d": "/data/ghn"}
    variants = ", ".join(f"{name}: {{start_from: '{start}'}}" for name, start in starts.items())
    (root / "profiles").mkdir()
    (root / "profiles" / "on.yaml").write_text(f"profile: on\ntrain: {{variants: {{{variants}}}}}\n")
    (root / "params.yaml").symlink_to(ROOT / "params.yaml")
    (root / "runs" / "on").mkdir(parents=True)
    for there in None, "someone/ghn":
        if there:
            (root / there).mkdir(parents=True)
        pipeline.prepare(root, root / "runs" / "on")
        seen = read_yaml(root / "runs" / "on" / "params.yaml")["train"]["variants"]
        moved = {"a": "../../models/ghn3-{seed}"} | ({"b": "../../someone/ghn"} if there else {})
        assert {name: seen[name]["start_from"] for name in starts} == starts | moved


def test_released_files_are_seen_from_the_folder_of_a_profile(tmp_path):
    root = tmp_path
    (root / "profiles").mkdir()
    (root / "profiles" / "released.yaml").write_text("profile: released\ndeepnets: {path: datasets/deepnets1m}\n")
    (root / "params.yaml").symlink_to(ROOT / "params.yaml")
    (root / "runs" / "released").mkdir(parents=True)
    pipeline.prepare(root, root / "runs" / "released")
    assert read_yaml(root / "runs" / "released" / "params.yaml")["deepnets"]["path"] == "../../datasets/deepnets1m"


@pytest.mark.parametrize(
    ("profile", "count"), [("tiny-imagenet-transfer", 4), ("detection", 2), ("cifar10", 3), ("fashion", 1)]
)
def test_every_dataset_of_a_profile_is_seen_from_its_folder(tmp_path, profile, count):
    _, params = prepared(tmp_path, profile)
    text = json.dumps(params)
    assert text.count("datasets") == text.count('"root": "../../datasets') == count


def test_a_profile_is_named_as_its_file(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "other.yaml").write_text("seed: 1\n")
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    with pytest.raises(ParamsError, match=r"profiles/other.yaml: profile = 'digits': must be other"):
        pipeline.prepare(tmp_path, tmp_path / "runs" / "other")


def test_a_profile_gets_a_folder_with_merged_parameters_and_its_own_dvc(tmp_path):
    folder, params = prepared(tmp_path, "cifar10-small")
    assert params["profile"] == "cifar10-small" and params["data"]["root"] == "../../datasets/cifar10"
    assert "no_scm = true" in (folder / ".dvc" / "config").read_text()
    assert (folder / "ghnlib" / "pipeline" / "run.py").exists() and not (folder / "ghnlib").is_symlink()
