"""Where a run's reports come from, told without naming who ran it or where."""

import getpass
import json
import re
import socket
import subprocess
from pathlib import Path

import torch

from ghnlib.params_file import read_yaml, validate
from ghnlib.pipeline.provenance import code_of, in_words, record

ROOT = Path(__file__).parents[2]


def test_code_is_a_commit_and_clean_unless_more_than_what_a_run_makes_has_changed(tmp_path):
    assert code_of(tmp_path) == {"commit": None, "clean": None}
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for name in "code.py", "dvc.lock":
        (tmp_path / name).write_text("1")
    for arguments in ["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    (tmp_path / "dvc.lock").write_text("2")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "new").write_text("3")
    found = code_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["clean"] is True
    (tmp_path / "code.py").write_text("2")
    assert code_of(tmp_path) == found | {"clean": False}


def test_a_record_names_what_decides_on_numbers_and_nobody(tmp_path):
    params = validate(read_yaml(ROOT / "params.yaml"))
    record(tmp_path, params, {"commit": "0123456789abcdef", "clean": False}, 1500.4, 24, 24)
    text = (tmp_path / "reports/digits/provenance.json").read_text()
    found = json.loads(text)
    assert torch.__version__.startswith(found["versions"]["torch"]) and found["versions"]["ghnlib"]
    assert found["processor"]["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert (found["seconds"], found["seeds"]) == (1500, {"data": 0, "train": [0, 1, 2, 3]})
    assert socket.gethostname() not in text and str(ROOT) not in text and str(tmp_path) not in text
    assert f'"{getpass.getuser()}"' not in text
    told = in_words(found)
    assert (
        told.startswith("Made from commit 0123456789 with changes that were not committed on 20") and "25 min" in told
    )

    record(tmp_path, params.model_copy(update={"seed": 1}), {"commit": None, "clean": None}, 1.0, 1, 24)
    other = json.loads((tmp_path / "reports/digits/provenance.json").read_text())
    assert other["parameters"] != found["parameters"]
    assert "code without a commit on" in in_words(other) and "1 of 24 stages in 1 min" in in_words(other)
