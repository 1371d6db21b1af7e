import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from ghnlib.params_file import read_yaml, validate
from ghnlib.pipeline import notebooks, run
from ghnlib.pipeline.notebooks import NotebookError
from ghnlib.training import jobs

ROOT = Path(__file__).parents[2]
PARAMETERS = "profile = None\nseed = None\nfinetune = None"


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with parameters and a finetune notebook to be written by the test."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def write(*sources):
        notebooks.write(notebooks.clean(notebook(*sources)), Path(".sources/4_finetune.ipynb"))
        return tmp_path

    return write


REPORT = Path("reports/digits/4_finetune.ipynb")


def test_a_stage_gets_typed_parameters_and_leaves_a_normalised_report(tree, capfd):
    root = tree(
        PARAMETERS,
        "assert finetune['lrs']['sgd'][0] == 0.03 and seed == 0 and profile == 'digits'",
        "import sys, os; sys.stderr.write('bar'); print(os.getcwd()); print('\\rhalf\\rdone'); object()",
        f"assert sys.executable == {sys.executable!r}",
        "open('reports/digits/metrics/finetune.json', 'w').write('{}')",
    )
    notebooks.write_text("", Path("site/digits/1_architectures.html"))
    assert run.main(["finetune"]) == 0
    first = REPORT.read_bytes()
    report = json.loads(first)
    texts = json.dumps(report["cells"][3]["outputs"])
    assert str(root) not in texts and "bar" not in texts and "half" not in texts and "at 0x..." in texts
    assert "papermill" not in json.dumps(report["metadata"])
    assert str(root) in capfd.readouterr().out
    assert "seconds" in Path("site/digits/4_finetune.html").read_text()
    assert 'href="1_architectures.html"' in Path("site/digits/4_finetune.html").read_text()
    assert json.loads(Path("reports/digits/timing.json").read_text())["finetune"] > 0
    assert run.main(["finetune"]) == 0
    assert REPORT.read_bytes() == first


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "from ghnlib.data.images import DataError; raise DataError('no images in here')",
            "finetune: no images in here\n",
        ),
        ("raise OSError(28, 'No space left on device')", "the disk is full"),
        ("1 / 0", "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", "process died"),
    ],
)
def test_a_failing_notebook_says_why_and_leaves_the_earlier_report(tree, capfd, source, said):
    tree(PARAMETERS, source)
    notebooks.write_text("earlier", REPORT)
    assert run.main(["finetune"]) == 1
    assert said in capfd.readouterr().err
    assert REPORT.read_text() == "earlier" and not list(REPORT.parent.glob("*.new"))


@pytest.mark.parametrize(
    ("cell", "said"),
    [(PARAMETERS + "\nlearning_rate = 1", "learning_rate"), ("profile = None\nseed = None", "lacks some (finetune)")],
)
def test_names_that_no_parameter_has_are_refused(tree, capfd, cell, said):
    tree(cell)
    assert run.main(["finetune"]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["finetun"], ["train"], ["train@ghn9"], ["evaluate@ghn3"], ["a", "b"]])
def test_unknown_stages_are_refused(tree, capfd, arguments):
    tree(PARAMETERS)
    assert run.main(arguments) == 2
    assert "no stage named" in capfd.readouterr().err


def test_bad_parameters_are_one_message_and_status_2(tree, capfd):
    path = tree(PARAMETERS) / "params.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: zero", 1))
    assert run.main(["finetune"]) == 2
    assert re.fullmatch(r"finetune: params.yaml: seed = 'zero': .*integer", capfd.readouterr().err.strip())


def edited(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return text


SEED, EPOCHS = ("seed: 0", "seed: zero"), ("epochs: 2 ", "epochs: 3 ")
LR, POOL = ("lr: 5e-3", "lr: -1.0"), ("train_pool: 400", "train_pool: 500")
SECTION, UNKNOWN = ("  ood: 25", "  odd: {a: 1}\n  ood: 25"), ("seed: 0", "seed: 0\nsed: 1")


@pytest.mark.parametrize(
    ("changes", "experiment", "left"),
    [([SEED], True, []), ([SEED], False, [SEED]), ([SEED, LR], True, []), ([SEED, EPOCHS, POOL], True, [EPOCHS, POOL]),
     ([EPOCHS, SECTION, UNKNOWN], True, [EPOCHS]), ([("seed: 0", "seed: [0")], True, None)],
    ids=["dvc exp run", "dvc repro", "two wrong ones", "edited besides", "unknown keys", "no YAML"],
)  # fmt: skip
def test_a_refused_value_of_an_experiment_leaves_the_parameters(tree, capfd, monkeypatch, changes, experiment, left):
    path = tree(PARAMETERS) / "params.yaml"
    before = path.read_text()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in ["init", "-q"], ["add", "params.yaml"], [*who, "commit", "-qm", "a"]:
        subprocess.run(["git", *arguments], check=True)
    after = edited(path, *changes)
    if experiment:
        monkeypatch.setenv("DVC_EXP_BASELINE_REV", "HEAD")
    assert run.main(["sources"]) == 2
    said = capfd.readouterr().err
    if left is None or not experiment:
        assert path.read_text() == after and ("git checkout HEAD -- params.yaml" in said) == experiment
        return
    found = read_yaml(path)
    if not left:
        assert path.read_text() == before and "params.yaml is as before" in said
    path.write_text(before)
    edited(path, *left)
    assert found == read_yaml(path)
    assert ("other changes stay" in said) == bool(left)


def test_the_job_of_a_training_is_written_without_training(tree, capfd):
    root = tree(PARAMETERS)
    assert run.main(["job@ghn3-1"]) == 0
    path = Path(".training/digits/train-ghn3-1/job.json")
    job, params = jobs._read(str(path)), validate(read_yaml(root / "params.yaml"))
    assert str(path) in capfd.readouterr().out and Path(job.folder) == path.parent
    assert (job.training_seed, job.recipe, job.device) == (1, params.train.recipe_of("ghn3"), "auto")
    assert run.main(["job@ghn9-1"]) == 2


def test_the_run_of_a_profile_sees_modules_of_ones_own_beside_the_pipeline(tree, monkeypatch):
    root = tree(PARAMETERS)
    for folder in root, root / "runs" / "own":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dvc.yaml").touch()
        monkeypatch.chdir(folder)
    with run._own_kernel():
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(folder), str(root), str(ROOT)]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_runner_takes_its_kernel_along(tree, sent, status):
    root = tree(PARAMETERS, "import os, time; open('pid', 'w').write(str(os.getpid()))", "time.sleep(60)")
    runner = subprocess.Popen(
        [sys.executable, "-m", "ghnlib.pipeline.run", "finetune"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
        # Where the tests run in the background of a shell, Ctrl-C is ignored, and would be here too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(lambda: (root / "pid").exists() and (root / "pid").read_text())
    kernel = int((root / "pid").read_text())
    runner.send_signal(sent)
    assert runner.wait(20) == status
    wait_for(lambda: not alive(kernel))
    assert not REPORT.exists()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_cleaning_removes_what_jupyter_adds_and_nothing_else():
    original = notebook("a = 1", "print(a)")
    opened = nbformat.from_dict(json.loads(json.dumps(original)))
    opened.metadata["language_info"] = {"name": "python", "version": "3.99"}
    opened.cells[1].outputs = [nbformat.v4.new_output("stream", text="1")]
    opened.cells[1].execution_count = 7
    opened.cells[1].id = "zzz"
    opened.cells[1].metadata = {"collapsed": True, "execution": {"iopub.status.busy": "now"}}
    assert notebooks.clean(opened) == notebooks.clean(original)
    assert notebooks.clean(opened).cells[0].metadata.tags == ["parameters"]


def test_normalising_joins_prints_and_renames_styled_tables(tmp_path):
    def executed(name, cuts):
        cell = nbformat.v4.new_code_cell("x")
        cell.outputs = [nbformat.v4.new_output("stream", text=text) for text in cuts]
        html = f'<style>#T_{name} th {{}} #T_{name}_row0 {{}}</style><table id="T_{name}">'
        cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": html, "image/png": f"T_{name}"}))
        return notebooks.normalise(nbformat.v4.new_notebook(cells=[cell]), tmp_path)

    one, other = executed("0a1b2", ["a\nb", "c\n"]), executed("fffff", ["a\n", "bc\n"])
    assert one.cells[0].outputs[1].data["text/html"] == other.cells[0].outputs[1].data["text/html"]
    assert one.cells[0].outputs[0] == other.cells[0].outputs[0]
    assert other.cells[0].outputs[1].data["image/png"] == "T_fffff"


def test_a_broken_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(NotebookError, match="x.ipynb"):
        notebooks.read(tmp_path / "x.ipynb")


def test_what_other_code_has_kept_is_forgotten(tree, monkeypatch):
    root = tree(PARAMETERS, "1")
    (root / "ghnlib" / "graphs").mkdir(parents=True)
    (root / "ghnlib" / "reporting").mkdir()
    code, kept = root / "ghnlib" / "graphs" / "graph.py", root / ".training" / "kept"

    def remembered_after(path, text):
        (kept / "result").write_text("1")
        path.write_text(text)
        run._forget_other_code(kept)
        return (kept / "result").exists()

    code.write_text("a = 1")
    run._forget_other_code(kept)
    assert remembered_after(code, "a = 1")
    assert remembered_after(root / "ghnlib" / "reporting" / "plots.py", "colours = 2")
    assert not remembered_after(code, "a = 2")


def test_a_training_is_given_its_own_variant_and_seed_alone(tree):
    tree(PARAMETERS, "1")
    values = run.available("train", "ghn1-2", run._read_params())
    assert list(values["train"]["variants"]) == ["ghn1"] and values["folder"] == ".training/digits/train-ghn1-2"
    assert (values["variant"], values["training_seed"], values["train"]["seeds"]) == ("ghn1", 2, [2])
    assert len(run.available("evaluate", "", run._read_params())["train"]["variants"]) == 4


# The pipeline itself: dvc.yaml, the notebooks and the code agree.


@pytest.fixture(scope="module")
def dvc():
    return read_yaml(ROOT / "dvc.yaml")


def imported_files(source):
    """Files of ghnlib that a piece of code imports, itself or through others."""
    found, todo = set(), [source]
    while todo:
        for path in _direct_imports(todo.pop()) - found:
            found.add(path)
            todo.append((ROOT / path).read_text())
    return found


def _direct_imports(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghnlib"):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {path for name in names if (ROOT / (path := name.replace(".", "/") + ".py")).exists()}


NEVER = ("ghnlib/released/", "ghnlib/params_file.py", "ghnlib/processes.py")
"""What decides on no result: readers of released files, messages on parameters, how processes end."""


@pytest.mark.parametrize("stage", notebooks.NOTEBOOKS)
def test_stages_depend_on_what_their_notebook_imports_and_reads(stage, dvc):
    declared = dvc["stages"][stage].get("do", dvc["stages"][stage])
    path = ROOT / "notebooks" / f"{notebooks.NOTEBOOKS[stage]}.ipynb"
    cells = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "code"]
    never = (*NEVER, "ghnlib/reporting/") if stage == "train" else NEVER  # an edit to the figures retrains nothing
    needed = {file for file in imported_files("\n".join(cells)) if not file.startswith(never)}
    if stage == "claims":  # it computes nothing: what it shows comes from the metrics
        needed = {file for file in needed if file.startswith(("ghnlib/pipeline", "ghnlib/reporting"))}
    assert not {file for file in needed if not file.startswith(tuple(declared["deps"]))}
    assert "requirements.lock" in declared["deps"]
    read = set(run.papermill.inspect_notebook(str(path))) - {"folder", "variant", "training_seed"}
    assert read <= {name.split(".")[0] for name in declared["params"]}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path):
    ours = notebooks.read(path)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in ours.cells)
    assert ours.metadata.kernelspec.name == "python3" and "language_info" in ours.metadata
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in ours.cells) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_are_short_and_fold(path):
    for cell in notebooks.read(path).cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= 20 and max(map(len, lines)) <= 120, cell.source
            assert set(cell.metadata["tags"]) & {"parameters", "hide-input"}


def test_plots_show_every_variant(dvc):
    variants = read_yaml(ROOT / "params.yaml")["train"]["variants"]
    for plot in dvc["plots"]:
        ((_, axes),) = plot.items()
        assert list(axes["y"]) == [f"models/{name}-0/history.csv" for name in variants]
        assert len(set(axes["y"].values())) == 1


def test_stages_that_end_together_keep_each_others_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"stage-{i}" for i in range(20)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda name: run._record_seconds(tmp_path / "timing.json", name, 1.0), names))
    assert sorted(json.loads((tmp_path / "timing.json").read_text())) == sorted(names)
