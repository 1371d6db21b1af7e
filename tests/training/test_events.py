"""Histories for TensorBoard."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from shared import JOB, ROOT

from ghnlib.params_file import ParamsError, read_yaml, validate
from ghnlib.training.checkpointing import TrainingError
from ghnlib.training.jobs import Job, train_job


@pytest.fixture
def written(monkeypatch):
    """What a stand-in for torch's writer is told: events, and where its files begin anew."""
    events, begun = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            begun.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return SimpleNamespace(events=events, begun=begun)


def job(folder, **changes):
    return Job.of(JOB | {"folder": str(folder), "logger": "tensorboard"} | changes)


def test_events_are_the_history_and_go_on_where_a_training_does(tmp_path, written, monkeypatch):
    validated = 0

    def fail(*_):
        nonlocal validated
        validated += 1
        if validated == 2:
            raise KeyboardInterrupt
        return 50.0

    monkeypatch.setattr("ghnlib.training.jobs.validation_accuracy", fail)
    recipe = JOB["recipe"] | {"validate_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train_job(job(tmp_path, recipe=recipe))
    assert written.begun == [(str(tmp_path / "events"), 2)]
    train_job(job(tmp_path, recipe=recipe))
    assert written.begun[1:] == [(str(tmp_path / "events"), 4)]
    history = pd.read_csv(tmp_path / "history.csv").set_index("step")
    found = {(name, step): value for name, value, step in written.events}
    assert len(found) == len(written.events) == history.size
    assert found == pytest.approx({(name, step): history.loc[step, name] for name, step in found})


def test_without_tensorboard_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    raw = read_yaml(ROOT / "params.yaml")
    raw["train"]["logger"] = "tensorboard"
    with pytest.raises(ParamsError, match=r"train.logger = 'tensorboard': .*pip install ghnlib\[tensorboard\]"):
        validate(raw)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"pip install ghnlib\[tensorboard\]"):
        train_job(job(tmp_path))
    assert not (tmp_path / "history.csv").exists()
