"""The meta-training loop: gradients, schedules, resumption, failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from ghnlib import GHN, DeepNets
from ghnlib.data import load_images
from ghnlib.images import Augment
from ghnlib.jobs import train_in_processes
from ghnlib.training import (
    MetaTrainer,
    Recipe,
    TrainingError,
    learning_rate_factor,
    sample_meta_batch,
    train_ghn,
)  # fmt: skip

POOL = list(DeepNets("train", space="small", size=12))
IMAGES = load_images("digits").train
SHORT = Recipe(steps=12, batch_size=8, meta_batch=2, log_every=3, validate_every=6)


def new_ghn():
    torch.manual_seed(0)
    return GHN({"hid": 16, "layers": 1, "heads": 2, "max_shape": (16, 16, 11, 11)})


def train(folder, recipe=SHORT, ghn=None, validate=None):
    ghn = ghn or new_ghn()
    history = train_ghn(ghn, POOL, IMAGES, recipe, folder, 0, Augment(1), validate)
    return ghn, history


def assert_same_weights(a, b, **tolerance):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **{"rtol": 0, "atol": 0} | tolerance)


def test_two_phases_give_the_gradients_of_the_joint_backward_pass():
    recipe = Recipe(meta_batch=3, gamma=1e-3, dropout=False, clip=1e9, lr=1e-12)
    images, labels = next(IMAGES.batches(8))
    trainer = MetaTrainer(new_ghn(), recipe, 1)
    trainer.step(POOL[:3], images, labels, seed=0)
    joint = new_ghn()
    loss = 0
    for architecture, parameters in zip(POOL[:3], joint.predict([a.graph for a in POOL[:3]])):
        net = architecture.build(device="meta").eval()
        logits = torch.func.functional_call(net, parameters, (images,))
        loss = loss + F.cross_entropy(logits, labels) + recipe.gamma * sum(p.norm() for p in parameters.values())
    (loss / 3).backward()
    for (name, ours), (_, expected) in zip(trainer.ghn.named_parameters(), joint.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_same_seed_same_weights_and_history(tmp_path):
    a, first = train(tmp_path / "a")
    b, second = train(tmp_path / "b")
    assert_same_weights(a, b)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert (tmp_path / "a" / "history.csv").read_bytes() == (tmp_path / "b" / "history.csv").read_bytes()


class Interrupted(Exception):
    pass


def test_an_interrupted_training_resumes_exactly(tmp_path):
    whole, history = train(tmp_path / "whole", validate=lambda ghn: {"value": 1.0})
    calls = []

    def fail_once(ghn):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return {"value": 1.0}

    with pytest.raises(Interrupted):
        train(tmp_path / "part", validate=fail_once)
    resumed, resumed_history = train(tmp_path / "part", validate=lambda ghn: {"value": 1.0})
    assert_same_weights(whole, resumed)
    pd.testing.assert_frame_equal(history, resumed_history, check_exact=True)


def test_the_checkpoint_of_another_configuration_is_not_used(tmp_path, capsys):
    train(tmp_path)
    other, _ = train(tmp_path, Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3, lr=1e-4))
    assert "starting anew" in capsys.readouterr().out
    fresh, _ = train(tmp_path / "fresh", Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3, lr=1e-4))
    assert_same_weights(other, fresh)


JOB = {
    "data": {"source": "digits", "root": None, "image_size": 16, "val_share": 0.2, "test_share": 0.2, "shift": 1,
             "flip": False, "download": False},
    "deepnets": {"scale": "small", "train_pool": 12, "val": 3, "test": 1, "ood": 1}, "seed": 0, "classes": None,
    "ghn": {"hid": 16, "layers": 1, "heads": 2, "max_shape": [16, 16, 11, 11]},
    "recipe": {"steps": 6, "batch_size": 8, "meta_batch": 2, "log_every": 2, "validate_every": 6, "optimizer": "adamw"},
}  # fmt: skip


def test_two_processes_take_the_step_of_one(tmp_path):
    job = JOB | {"recipe": JOB["recipe"] | {"steps": 1, "log_every": 1}}
    one, two = (train_in_processes(job | {"folder": str(tmp_path / str(n))}, n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)
    # Sums are taken in another order, and Adam's first step is the sign of a gradient, which may be rounding error.
    weights = [torch.cat([p.flatten() for p in GHN.from_pretrained(tmp_path / n / "model").parameters()]) for n in "12"]
    assert torch.isclose(*weights, rtol=0, atol=1e-5).float().mean() > 0.97


def test_a_killed_training_resumes_with_the_same_result(tmp_path):
    job = JOB | {"recipe": JOB["recipe"] | {"steps": 40, "validate_every": 40}}
    whole = train_in_processes(job | {"folder": str(tmp_path / "whole")}, 1)
    code = f"from ghnlib.jobs import train_in_processes as t; t({job | {'folder': str(tmp_path / 'killed')}!r}, 1)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = train_in_processes(job | {"folder": str(tmp_path / "killed")}, 1)
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)


def test_a_second_writer_is_kept_out(tmp_path):
    def second(ghn):
        train(tmp_path)
        return {}

    with pytest.raises(TrainingError, match="another process"):
        train(tmp_path, validate=second)


def test_losses_that_are_not_finite_stop_the_training(tmp_path):
    ghn = new_ghn()
    ghn.weight_decoder.conv2.bias.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        train(tmp_path, Recipe(steps=50, batch_size=8, meta_batch=2), ghn)


def test_one_bad_network_is_dropped_and_counted(monkeypatch):
    trainer = MetaTrainer(new_ghn(), SHORT, 1)
    run = trainer._run_child
    bad = POOL[0]
    monkeypatch.setattr(trainer, "_run_child", lambda a, *rest: (float("nan"), 0.0, 0.0) if a is bad else run(a, *rest))
    images, labels = next(IMAGES.batches(8))
    before = [p.detach().clone() for p in trainer.ghn.parameters()]
    result = trainer.step(POOL[:2], images, labels, seed=0)
    assert result["skipped"] == 1 and result["loss"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.ghn.parameters()))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        train(tmp_path, Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3, lr=1e-5))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_meta_batches_are_drawn_without_replacement_and_within_the_node_limit():
    recipe = Recipe(meta_batch=3)
    drawn, position = [], 0
    for _ in range(len(POOL) // 3):
        chosen, position = sample_meta_batch(POOL, recipe, 0, position)
        drawn += chosen
    assert {id(a) for a in drawn} == {id(a) for a in POOL}
    with pytest.raises(TrainingError, match="max_nodes=1 "):
        sample_meta_batch(POOL, Recipe(meta_batch=3, max_nodes=1), 0, 0)
    with pytest.raises(TrainingError, match="meta_batch=99"):
        sample_meta_batch(POOL, Recipe(meta_batch=99), 0, 0)


def test_cosine_epochs_is_the_schedule_of_ghn3():
    recipe = Recipe(steps=75, lr=4e-4, schedule="cosine-epochs", warmup=5 / 75)
    rates = [recipe.lr * learning_rate_factor(recipe, step, steps_per_epoch=1) for step in range(7)]
    expected = [1e-5, 1.075e-4, 2.05e-4, 3.025e-4, 3.998e-4, 4e-4, 3.998e-4]
    assert rates == pytest.approx(expected, rel=1e-3)


def test_multistep_divides_the_rate_at_the_milestones():
    recipe = Recipe(steps=300, schedule="multistep")
    factors = [learning_rate_factor(recipe, step, 1) for step in (0, 199, 200, 250)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01])
