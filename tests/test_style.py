"""Code and notebooks have the style of ``pyproject.toml``."""

import subprocess
import sys

import pytest
from shared import ROOT

CODE = ["ghnlib", "tests", "benchmarks"]


@pytest.mark.parametrize("arguments", [["check", *CODE, "notebooks"], ["format", "--check", *CODE]], ids=" ".join)
def test_ruff_has_nothing_to_say(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
