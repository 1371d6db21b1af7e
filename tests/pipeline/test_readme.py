"""The results in README.md and reports/README.md, which ``make readme`` writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ghnlib.params_file import read_yaml, validate
from ghnlib.pipeline import readme
from ghnlib.reporting.publish import EVALUATED, published
from ghnlib.reporting.statistics import Measured

ROOT = Path(__file__).parents[2]
FILES = {"README.md": readme.headline, "reports/README.md": readme.results}
CLAIMS = """paper,claim,published,ours,low,high,scale,verdict
A,a,1,2.0,1.0,3.0,small,held
B,b,1,-2.0,-3.0,-1.0,small,not held
B,"c, d",1,-2.0,,,small,not decided (no interval)
B,e,1,2.0,-1.0,5.0,small,not decided
B,f,1,,,,,not testable at this scale
"""


def mean(value, n=4):
    return {"n": n, "mean": value, "deviation": 1.0, "standard_error": 0.5}


TRANSFER = {
    "accuracy": {"other classes": {name: {"40 steps": mean(90.0, n), "4 steps": mean(10.0, n)} for name, n in (("ghn3", 4), ("random", 4), ("trained", 1))}},
    "chance": {"other classes": 20.0}, "average_precision": {"random": 94.71, "ghn3": 86.0},
}  # fmt: skip


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with the results of transfer of the default profile and a README without them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports/digits"
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics/transfer.json").write_text(json.dumps(TRANSFER))
    (folder / "claims.csv").write_text(CLAIMS)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for name in FILES:
        Path(name).write_text(f"before\n{readme.START}\nold\n{readme.END}\nafter\n")
    return tmp_path


@pytest.fixture(scope="module")
def params():
    return validate(read_yaml(ROOT / "params.yaml"))


def table_of(paragraphs):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in paragraphs[1].splitlines()]


def section_of(text):
    return text.split(readme.START)[1].split(readme.END)[0].strip()


def test_only_the_sections_are_replaced(tree):
    for name, value in evaluated("ghn2").items():
        Path(f"reports/digits/metrics/{name}.json").write_text(json.dumps(value))
    assert readme.main() == 0
    texts = {name: Path(name).read_text() for name in FILES}
    for name, told in FILES.items():
        assert texts[name] == f"before\n{readme.START}\n\n{told(tree)}\n\n{readme.END}\nafter\n"
    assert readme.main() == 0 and {name: Path(name).read_text() for name in FILES} == texts, "twice is once"
    assert "](reports/digits/8_claims.ipynb)" in texts["README.md"] and "](digits/8_" in texts["reports/README.md"]


def test_a_file_without_the_section_is_left_as_it_is(tree, capsys):
    Path("README.md").write_text("nothing")
    assert readme.main() == 1 and Path("README.md").read_text() == "nothing"
    assert readme.START in capsys.readouterr().err


def test_a_profile_tells_its_title_its_stages_and_its_claims(tree):
    title, text, table, detection, claims, *_ = readme.results(tree).split("\n\n")
    assert title == "## Handwritten digits (default profile)"
    assert (
        "5 images of each class, mean ± standard error over 4 architectures, seeds [0, 1, 2, 3]" in text
        and "chance is 20%" in text
    )
    assert [line.split(" | ")[0] for line in table.splitlines()] == [
        "| initialisation",
        "| ---",
        "| random",
        "| ghn3",
        "| trained",
    ]
    assert table.splitlines()[-1] == "| trained | 10.0 (n = 1) | 90.0 (n = 1) |", "the first moment is first"
    assert detection.endswith("seeds [0, 1, 2, 3]: random 94.7, ghn3 86.0.") and "digit scenes, 64 pixels" in detection
    assert claims == (
        "Of 5 [claims of the papers](digits/8_claims.ipynb): 1 held, 2 not decided, 1 not held, 1 not testable "
        "at this scale. Contradicted here: b (B). Not decided, but against the papers' direction: 1."
    )


def test_a_profile_that_measured_nothing_of_these_is_not_told(tree):
    Path("reports/digits/metrics/transfer.json").rename("reports/digits/metrics/architectures.json")
    assert readme.results(tree) == ""


def test_claims_over_profiles_count_what_several_trainings_decide(tree):
    shutil.copytree(ROOT / "profiles", "profiles")
    held, against, open_ = (
        Measured(2.0, 1.0, 3.0, 9, 3),
        Measured(-2.0, -3.0, -1.0, 9, 3),
        Measured(-2.0, -3.0, 1.0, 9, 3),
    )
    found = {
        "digits": {"without-training-ghn2-mlp": held, "without-training-ghn2-ghn1": held, "penalty": open_},
        "digits-long": {"without-training-ghn2-mlp": against, "penalty": against, "attention": held},
        "digits-pretrained": {"without-training-ghn2-ghn1": held},
        "cifar10-small": {"edges": held},
    }
    others = {"cifar10-small": ("-1", "-2"), "digits-pretrained": ("-2",)}  # seeds that these have not
    for profile, claims in found.items():
        folder = Path(f"reports/{profile}/metrics")
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "claims.csv").write_text(CLAIMS)
        own = {"claims": {key: measured._asdict() for key, measured in claims.items()}}
        for name, value in evaluated("ghn3", **own).items():
            if not name.endswith(others.get(profile, "none")):
                (folder / f"{name}.json").write_text(json.dumps(value))
    shorter = {"claims": {"orth": held._asdict()}}
    Path("reports/digits-pretrained/metrics/transfer.json").write_text(json.dumps(shorter))
    table = readme.verdicts(tree)
    assert table.to_dict("index") == {
        key: dict(zip(["digits", "digits-pretrained", "digits-long"], row))
        for key, row in {
            "without-training-ghn2-mlp": ["+2 held", "", "-2 not held"],
            "without-training-ghn2-ghn1": ["+2 held", "+2 held", ""],
            "penalty": ["-2 not decided", "", "-2 not held"],
            "attention": ["", "", "+2 held"],
        }.items()
    }
    told = readme.headline(tree)
    assert "Trained for 100 steps on 4,000 architectures ([digits-long](reports/digits-long/3_evaluate.ipynb)" in told
    assert "they have ghn3 50.0 ± 2.0 on test: GHN-2 over MLP by -2 (not held)." in told
    (text,) = readme._over_profiles(table)
    assert text.startswith("Over the 3 profiles with several trainings, 4 of ") and "2 held, 1 not held, 1" in text
    assert "| GHN-3 Table 10 |  |  | +2 held |" in readme.results(tree)


def test_another_dataset_is_told_by_its_own_number_of_test_images(params):
    raw = params.model_dump(mode="json", exclude_unset=True)
    raw["transfer"]["targets"] = {"few": {"source": "folder", "root": "few", "image_size": 16, "test_per_class": 250}}
    found = TRANSFER | {"accuracy": {"few": TRANSFER["accuracy"]["other classes"]}, "chance": {"few": 10.0}}
    text, *_ = readme.TOLD["transfer"].tell({"transfer": found}, validate(raw))
    assert text.startswith("Accuracy (%) on few (250 test images of each class), which") and "chance is 10%" in text


def evaluated(*methods, **more):
    splits = dict.fromkeys(EVALUATED, mean(50.0, 25) | {"trainings": 3, "over_trainings": 2.04})
    accuracy = dict.fromkeys(methods, splits) | {"random": {"test": mean(10.0, 20)}}
    trained = {f"train-{method}-{seed}": {"steps": 100} for method in methods for seed in (0, 1, 2)}
    return trained | {"evaluate": {"accuracy": accuracy, "chance": 10.0, **more}}


def test_the_published_numbers_stand_beside_ours(params):
    paragraphs = readme.TOLD["evaluate"].tell(evaluated("mlp", "ghn2"), params)
    header, _, mlp, ghn2, random = table_of(paragraphs)
    assert header == ["parameters", *EVALUATED, "*n*", "paper, CIFAR-10", "paper, ImageNet"]
    assert mlp == ["mlp", *["50.0 ± 2.0"] * 5, "25", published("evaluate/cifar10")["mlp"], ""]
    assert ghn2[-2:] == [published(f"evaluate/{images}")["ghn2"] for images in ("cifar10", "imagenet")]
    assert random[:3] == ["random", "10.0 ± 0.5", ""] and len(paragraphs) == 2
    assert "100 steps, mean ± deviation over 3 trainings, each on 25 test, 25 wide, 25 deep, 25" in paragraphs[0]
    assert paragraphs[0].endswith("over *n* test architectures.")


def test_one_training_of_each_hypernetwork_is_said_and_decides_nothing(tree, params):
    splits = dict.fromkeys(EVALUATED, mean(50.0, 25))  # as in earlier reports
    found = {"accuracy": {"ghn2": splits, "random": {"test": mean(10.0, 20)}}, "chance": 10.0}
    metrics = {"train-ghn2": {"steps": 100}, "evaluate": found}
    paragraphs = readme.TOLD["evaluate"].tell(metrics, params)
    assert "100 steps, one training, on 25 test" in paragraphs[0] and table_of(paragraphs)[2][1] == "50.0"
    for name, value in metrics.items():
        Path(f"reports/digits/metrics/{name}.json").write_text(json.dumps(value))
    assert readme.results(tree).endswith("so that no claim about them is decided here.")


def test_hypernetworks_of_shorter_training_are_told_by_the_figure_alone(params):
    metrics = evaluated("ghn2", "ghn3") | {f"train-ghn3-{seed}": {"steps": 50} for seed in (0, 1, 2)}
    rows = table_of(readme.TOLD["evaluate"].tell(metrics, params))
    assert [row[0] for row in rows[2:]] == ["ghn2", "random"]


def test_fine_tuning_names_the_optimisers_that_were_chosen(params):
    accuracy = {"ghn3": {"2 epochs": mean(90.0), "0 steps": mean(80.0), "1 epoch": mean(85.0), "30 steps": mean(70.0)}}
    tuned = {"1 epoch": {"ghn3": {"optimizer": "sgd"}, "random": {"optimizer": "adamw"}}}
    text, table = readme.TOLD["finetune"].tell({"finetune": {"accuracy": accuracy, "tuned": tuned}}, params)
    assert "over 4 architectures, seeds [0, 1, 2, 3], settings (adamw or sgd and its rate) tuned equally on 2" in text
    assert table.splitlines()[0] == "| initialisation | 0 steps | 30 steps | 1 epoch | 2 epochs |"


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """What git has of the reports and their parameters, whatever has been run since."""
    folder = tmp_path_factory.mktemp("committed")
    paths = "params.yaml", "profiles", ":(glob)reports/*/metrics/*.json", ":(glob)reports/*/claims.csv"
    command = ["git", "-C", str(ROOT), "archive", "--output", str(folder / "files.tar"), "HEAD", "--", *paths]
    if not (ROOT / ".git").exists() or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the history: this is no clone")
    shutil.unpack_archive(folder / "files.tar", folder, filter="data")
    return folder


@pytest.mark.parametrize(("name", "told"), FILES.items())
def test_the_files_of_a_clone_tell_the_committed_reports_or_those_of_a_run_since(committed, name, told):
    section = section_of((ROOT / name).read_text(encoding="utf-8"))
    assert section == told(ROOT) or section == told(committed)
