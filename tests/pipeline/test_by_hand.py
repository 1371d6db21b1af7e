"""Notebooks as a reader of the repository runs them in Jupyter ("Run All"), after the pipeline has run."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def finished():
    """The run folder of the tiny profile, its pipeline up to date."""
    subprocess.run([sys.executable, "-m", "ghnlib.pipeline.profiles", "tiny"], cwd=ROOT, check=True)
    return ROOT / "runs" / "tiny"


@pytest.fixture
def status(finished):
    """What DVC says of the run folder."""
    return lambda: (
        subprocess.run(
            [sys.executable, "-m", "dvc", "status"], cwd=finished, capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_works_and_leaves_the_pipeline_as_it_is(name, finished, status):
    assert "up to date" in status()
    reports = {path: path.read_bytes() for path in (finished / "reports").rglob("*") if path.is_file()}
    notebook = nbformat.read(finished / "notebooks" / name, as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": finished / "notebooks"}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert f"Run by hand with the values of {finished / 'params.yaml'}" in printed
    assert "up to date" in status()
    assert {path: path.read_bytes() for path in (finished / "reports").rglob("*") if path.is_file()} == reports


@pytest.mark.slow
def test_a_hypernetwork_that_is_not_there_is_trained_for_the_pipeline_to_resume(finished, tmp_path):
    for name in "notebooks", "params.yaml", "dvc.yaml":
        (tmp_path / name).symlink_to(finished / name)
    shutil.copytree(finished / ".training", tmp_path / ".training")
    notebook = nbformat.read(tmp_path / "notebooks" / "2_train.ipynb", as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert (tmp_path / ".training" / "tiny" / "train-ghn3-0" / "checkpoint.pt").exists()
    assert not (tmp_path / "models").exists()
