"""``make`` in folders of any name, twice at once, and where nothing may be written; Python and pip are stand-ins."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import ROOT

STAND_IN = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/uv ;;
  *"--editable ."*) sleep 1; echo installed >> calls ;;
  *ghnlib*) echo "$*" >> calls ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a clone, höre"
    folder.mkdir()
    for name in "Makefile", "requirements.lock", "pyproject.toml":
        shutil.copy(ROOT / name, folder)
    (tmp_path / "python3").write_text(STAND_IN)
    (tmp_path / "python3").chmod(0o755)
    return folder


def make(folder, *arguments):
    return subprocess.run(
        ["make", f"PYTHON={folder.parent}/python3", *arguments], cwd=folder, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")},
    )  # fmt: skip


def test_the_environment_is_made_in_a_folder_of_any_name(folder):
    for calls in "installed\n", "installed\n-m ghnlib.pipeline.profiles tiny\n":
        done = make(folder, *(["repro", "PROFILE=tiny"] if "tiny" in calls else ["env"]))
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert (folder / "calls").read_text() == calls


@pytest.mark.parametrize(("target", "package"), [("docs", "pdoc"), ("plots", "vl-convert-python")])
def test_what_draws_pages_is_installed_beside_the_environment(folder, target, package):
    (folder.parent / "python3").write_text(STAND_IN.replace("*ghnlib*)", '*ghnlib*|*"--target .venv"*)'))
    assert make(folder, target).returncode == 0
    _, installed, built = (folder / "calls").read_text().splitlines()
    assert f"--no-deps --target .venv/{target} {package}==" in installed and built.startswith("-m ghnlib.pipeline.")


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock there is no lock")
def test_of_two_at_once_the_second_waits(folder):
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: make(folder, "env"), range(2)))
    assert [one.returncode for one in done] == [0, 0]
    assert (folder / "calls").read_text() == "installed\n"
    assert sorted("waiting" in one.stdout for one in done) in ([False, True], [False, False])


def test_an_interrupted_installation_starts_anew(folder):
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installing").touch()
    (folder / ".venv" / "half").touch()
    done = make(folder, "env")
    assert "interrupted" in done.stdout and not (folder / ".venv" / "half").exists()
