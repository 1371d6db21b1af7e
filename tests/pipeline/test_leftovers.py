"""A pipeline starts although an earlier one was killed, and waits for what still works."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import filelock
import pytest

from ghnlib.pipeline import profiles
from ghnlib.pipeline.leftovers import clear_away
from ghnlib.processes import sole_holder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text(profiles.CONFIG)
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: echo done > a.out, outs: [a.out]}}")
    return tmp_path


def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def locks(number, path="a.out"):
    return json.dumps(
        {"write": {path: {"pid": number, "cmd": "dvc repro"}}, "read": {path: [{"pid": number, "cmd": "x"}]}}
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [(lambda: locks(ended()), "have ended"), (lambda: locks(os.getpid()), "have ended"), (lambda: locks(1)[:40], "have ended"),
     (lambda: "", None), (lambda: "[]", None), (lambda: '{"read": {"a": [{}]}}', None), (lambda: "{}", None)],
    ids=["ended", "another's number", "cut", "empty", "list", "without number", "unheld"],
)  # fmt: skip
def test_locks_that_nobody_holds_are_removed(folder, capfd, content, said):
    path = folder / ".dvc" / "tmp" / "rwlock"
    path.write_text(content())
    for name in "lock", "rwlock.lock":
        path.with_name(name).write_text("what is this\n")
    clear_away(folder)
    output = capfd.readouterr().out
    assert f"removed {path}" in output and said in output if said else not output
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "a.out").exists(), done.stderr


def test_what_works_in_the_folder_is_waited_for_and_locks_of_others_stay(folder, capfd):
    path, elsewhere = folder / ".dvc" / "tmp" / "rwlock", folder / "other"
    elsewhere.mkdir()
    (folder / "dvc").write_text("import sys, time\nopen('started', 'w').close()\ntime.sleep(float(sys.argv[1]))")
    started = time.monotonic()
    with ExitStack() as stack:
        for place, seconds in (folder, "2"), (elsewhere, "60"):
            process = subprocess.Popen([sys.executable, folder / "dvc", seconds], cwd=place)
            stack.callback(process.wait)
            stack.callback(process.kill)
            while not (place / "started").exists():
                time.sleep(0.02)
        path.write_text(locks(process.pid))
        clear_away(folder)
        assert path.exists() and process.poll() is None
    assert time.monotonic() - started > 2 and "waiting for the end" in capfd.readouterr().out


def test_a_second_pipeline_waits_a_moment_for_the_first(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(profiles, "ENDING", 0.2)
    with sole_holder(folder / ".dvc" / "tmp" / "pipeline.lock", "the first", 0, print):
        assert profiles.main([]) == 2
    shown = capfd.readouterr()
    assert (
        "waiting 0.2 seconds" in shown.out
        and shown.err == f"the pipeline is already running in {folder}: processes none at work\n"
    )
    assert profiles.main([]) == 2  # there is no params.yaml, which is said in one line
    assert capfd.readouterr().err == f"{folder}/params.yaml cannot be read: No such file or directory\n"
    with filelock.FileLock(folder / ".dvc" / "tmp" / "pipeline.lock", timeout=0):
        pass


def test_where_nothing_may_be_written_it_is_said_in_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").touch()  # no folder can be made in it, by whomever
    assert profiles.main([]) == 2
    shown = capfd.readouterr().err
    assert len(shown.splitlines()) == 1 and ".dvc/tmp" in shown and "needs to write" in shown


def test_stages_end_with_a_pipeline_that_is_killed(tmp_path):
    """Without DVC between them."""
    pipeline = subprocess.Popen(["sleep", "60"])
    code = "import time, ghnlib.pipeline.run as r; r._read_params = lambda: time.sleep(60); open('up', 'w'); r.main(['sources'])"
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "GHNLIB_PIPELINE": str(pipeline.pid)})  # fmt: skip
    while not (tmp_path / "up").exists():
        assert stage.poll() is None
        time.sleep(0.05)
    pipeline.send_signal(signal.SIGKILL)
    pipeline.wait()
    assert stage.wait(30) == 143
