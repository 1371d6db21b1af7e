"""The meta-training loop: gradients, schedules, resumption, failures."""

import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import compress, count
from pathlib import Path

import filelock
import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from shared import JOB, digits, file_number, last_checkpoint, params, pool

from ghnlib import GHN, DeepNets
from ghnlib.architectures.vision import own_networks
from ghnlib.config import Recipe
from ghnlib.data.images import Augment
from ghnlib.training import checkpointing, jobs, loop, step
from ghnlib.training.checkpointing import TrainingError
from ghnlib.training.devices import device_of
from ghnlib.training.jobs import Job, run_job, train_job
from ghnlib.training.loop import sample_meta_batch, train_ghn
from ghnlib.training.ranks import share_of_rank
from ghnlib.training.step import MetaTrainer

JOBS = "ghnlib.training.jobs"
SHORT = Recipe(steps=12, batch_size=8, meta_batch=2, log_every=3, validate_every=6)


def architectures():
    return list(pool("train", 12))


def new_ghn():
    torch.manual_seed(0)
    return GHN({"hid": 16, "layers": 1, "heads": 2, "max_shape": (16, 16, 11, 11)})


def train(folder, recipe=SHORT, ghn=None, validate=None):
    ghn = ghn or new_ghn()
    history = train_ghn(ghn, architectures(), digits().train, recipe, folder, 0, Augment(1), validate)
    return ghn, history


def assert_same_weights(a, b, **tolerance):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **{"rtol": 0, "atol": 0} | tolerance)


@pytest.mark.parametrize("penalty", ["norm", "squared"])
@pytest.mark.parametrize("together", [4, 2])
def test_two_phases_give_the_gradients_of_the_joint_backward_pass(together, penalty, monkeypatch):
    monkeypatch.setattr(step, "PREDICTED_TOGETHER", together)
    recipe = Recipe(meta_batch=3, gamma=1e-3, penalty=penalty, dropout=False, clip=1e9, lr=1e-12)
    images, labels = next(digits().train.batches(8))
    trainer = MetaTrainer(new_ghn(), recipe, 1)
    trainer.step(architectures()[:3], images, labels, seed=0)
    joint = new_ghn()
    loss = 0
    for architecture, parameters in zip(architectures()[:3], joint.predict([a.graph for a in architectures()[:3]])):
        net = architecture.build(device="meta").eval()
        logits = torch.func.functional_call(net, parameters, (images,))
        power = {"norm": 1, "squared": 2}[penalty]
        loss = loss + F.cross_entropy(logits, labels) + 1e-3 * sum(p.norm() ** power for p in parameters.values())
    (loss / 3).backward()
    for (name, ours), (_, expected) in zip(trainer.ghn.named_parameters(), joint.named_parameters(), strict=True):
        # Sums are taken in another order: to be compared with the largest entry, small ones are differences.
        rounding = 1e-6 + 1e-5 * float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=rounding, msg=name)


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_low_precision_is_for_the_networks_alone(low):
    images, labels = next(digits().train.batches(8))
    results, gradients = [], []
    for precision in "float32", low:
        trainer = MetaTrainer(new_ghn(), Recipe(meta_batch=3, precision=precision, dropout=False, clip=1e9), 1)
        results.append(trainer.step(architectures()[:3], images, labels, seed=0))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.ghn.parameters() if p.grad is not None]))
        assert all(p.dtype == torch.float32 for p in trainer.ghn.parameters())
    assert results[0]["parameter_norm"] == results[1]["parameter_norm"]
    assert results[0]["loss"] != results[1]["loss"] == pytest.approx(results[0]["loss"], rel=0.02)
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


def test_same_seed_same_weights_and_history(tmp_path):
    a, first = train(tmp_path / "a")
    b, second = train(tmp_path / "b")
    assert_same_weights(a, b)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert (tmp_path / "a" / "history.csv").read_bytes() == (tmp_path / "b" / "history.csv").read_bytes()


def test_a_process_that_lacks_images_ends_in_one_line(tmp_path):
    wanted = job(tmp_path, data={**JOB["data"], "source": "folder", "root": str(tmp_path / "none")})
    (tmp_path / "job.json").write_text(wanted.model_dump_json())
    with pytest.raises(SystemExit) as stopped:
        jobs._main([str(tmp_path / "job.json")])
    assert re.fullmatch(f"DataError: no images in {tmp_path}/none: [^\n]+", stopped.value.code)


@pytest.mark.parametrize(
    ("text", "arguments"), [(None, []), (None, ["job.json"]), ("{}", ["job.json"]), ("{}", ["job.json", "job.json"])]
)
def test_what_is_no_file_of_a_job_is_named_and_how_one_is_written(tmp_path, monkeypatch, text, arguments):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "job.json").write_text(text)
    with pytest.raises(SystemExit, match=r"job.json.*ghnlib.pipeline.run job@VARIANT-SEED writes"):
        jobs._main(arguments)


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


def test_the_checkpoint_of_another_configuration_is_set_aside(tmp_path, capsys):
    train(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    other, _ = train(tmp_path, Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3, lr=1e-4))
    assert "starting anew" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.old.pt").read_bytes() == before
    fresh, _ = train(tmp_path / "fresh", Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3, lr=1e-4))
    assert_same_weights(other, fresh)


@pytest.mark.parametrize("what", ["start", "labels", "classes", "networks", "number", "extra"])
def test_the_training_of_another_start_or_on_others_is_set_aside(tmp_path, capsys, what):
    images, networks, ghn = digits().train, architectures(), new_ghn()
    recipe = Recipe(steps=1, batch_size=8, meta_batch=1, extra_share=0.5)
    extra = own_networks(["ghnlib.architectures.handwritten:vgg"], 10, 16)
    train_ghn(new_ghn(), networks, images, recipe, tmp_path, 0, extra=extra)
    train_ghn(new_ghn(), architectures(), images, recipe, tmp_path, 0, extra=extra)
    assert "starting anew" not in capsys.readouterr().out
    if what == "start":
        ghn.norm.bias.data.fill_(0.1)
    images = {"labels": replace(images, labels=images.labels.flip(0)),
              "classes": images.subset(range(9))}.get(what, images)  # fmt: skip
    networks = {"networks": list(pool("train", 12, seed=1)), "number": networks[:-1]}.get(what, networks)
    extra = own_networks(["ghnlib.architectures.handwritten:vit"], 10, 16) if what == "extra" else extra
    train_ghn(ghn, networks, images, recipe, tmp_path, 0, extra=extra)
    assert "starting anew" in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_and_called_again_with_the_same_hypernetwork_it_resumes(tmp_path, monkeypatch, at):
    whole, _ = train(tmp_path / "whole")
    update, steps, ghn = MetaTrainer.step, count(), new_ghn()

    def interrupted(*arguments, **options):
        if next(steps) == at:
            raise KeyboardInterrupt
        return update(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "part", ghn=ghn)
    assert_same_weights(whole, train(tmp_path / "part", ghn=ghn)[0])


@pytest.mark.parametrize(("networks", "images", "said"), [
    ([], digits().train, "there are 0 networks and 1[0-9]+ images"),
    (architectures(), digits().train.subset([]), "there are 12 networks and 0 images"),
    ([torch.nn.Linear(3, 3)], digits().train, "a Linear has no graph: give architectures"),
    (pool("train", 2, num_classes=5), digits().train, r"is for 10 classes, networks are for 5: for_classes\(5\)"),
    (architectures(), replace(digits().train, classes=tuple("abcdefghijk")), r"images are of 11 classes.*for_classes\(11"),
])  # fmt: skip
def test_what_a_hypernetwork_cannot_be_trained_on_is_named(tmp_path, networks, images, said):
    with pytest.raises(TrainingError, match=said):
        train_ghn(new_ghn(), networks, images, Recipe(meta_batch=1), tmp_path, 0)


def test_other_intervals_continue_a_training(tmp_path, capsys):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "part", validate=None)
    resumed, _ = train(tmp_path / "part", replace(SHORT, log_every=1, validate_every=1))
    assert "resuming after step 12" in capsys.readouterr().out
    assert_same_weights(whole, resumed)


def job(folder, recipe=None, **sections):
    """The training of ``JOB`` in a folder, with changes of its recipe or sections."""
    return Job.of(JOB | {"recipe": JOB["recipe"] | (recipe or {}), "folder": str(folder)} | sections)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("deepnets", "train_pool", 11), ("data", "val_share", 0.3), (None, "classes", [0, 1, 2])],
)
def test_a_training_on_other_architectures_or_images_starts_anew(tmp_path, capsys, section, key, value):
    train_job(job(tmp_path))
    shorter = {"val": 2} if section == "deepnets" else {"test_per_class": 5}
    same = {name: JOB[name] | shorter for name in [section] if name}
    train_job(job(tmp_path, **same))
    assert "resuming after step 6" in capsys.readouterr().out
    other = {section: JOB[section] | {key: value}} if section else {key: value}
    train_job(job(tmp_path, **other))
    assert "starting anew" in capsys.readouterr().out


def test_two_processes_take_the_steps_of_one(tmp_path):
    recipe = {"steps": 3, "log_every": 1, "meta_batch": 3, "lr": 1e-5}
    folders = [tmp_path / n for n in "12"]
    train_job(job(folders[0], recipe))
    path = folders[1] / "job.json"
    path.parent.mkdir()
    path.write_text(job("elsewhere", recipe).model_dump_json())  # the folder of the file counts
    nodes = ["--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "ghnlib.training.jobs", path]
    subprocess.run(torchrun, check=True)
    one, two = (pd.read_csv(folder / "history.csv") for folder in folders)
    pd.testing.assert_frame_equal(one[:1], two[:1], rtol=1e-3)
    # Sums are taken in another order, and Adam's first steps are signs of gradients, which may be rounding errors.
    pd.testing.assert_frame_equal(one.drop(columns="grad_norm"), two.drop(columns="grad_norm"), rtol=1e-3)
    assert two["grad_norm"].tolist() == pytest.approx(one["grad_norm"].tolist(), rel=0.05)
    weights = [torch.cat([p.flatten() for p in GHN.from_pretrained(f / "model").parameters()]) for f in folders]
    assert torch.isclose(*weights, rtol=0, atol=1e-6).float().mean() > 0.97


def rank(monkeypatch, number, count=2):
    for name, value in ("is_initialized", True), ("get_rank", number), ("get_world_size", count):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_networks_of_about_equal_cost(monkeypatch, count):
    ratios, balanced = [], []
    for seed in range(50):
        costs = [int(random.Random(f"{seed} {i}").lognormvariate(5, 0.6)) for i in range(8)]
        parts = []
        for number in range(count):
            rank(monkeypatch, number, count)
            parts.append(share_of_rank(range(8), costs.__getitem__))
        assert sorted(sum(parts, [])) == list(range(8)) and all(part == sorted(part) for part in parts)
        assert max(map(len, parts)) <= math.ceil(8 / count)
        strided = [sorted(costs, reverse=True)[number::count] for number in range(count)]
        ratios.append(max(map(sum, strided)) / sum(costs) * count)
        balanced.append(max(sum(costs[i] for i in part) for part in parts) / sum(costs) * count)
    assert sum(balanced) / 50 - 1 < (sum(ratios) / 50 - 1) / 2


def test_ranks_that_see_different_folders_do_not_train(tmp_path, monkeypatch):
    rank(monkeypatch, 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number: number.add_(9))  # of the first rank
    with pytest.raises(TrainingError, match="after step 9, 10 others would not: .* one folder"):
        train(tmp_path)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match="2 GPUs.*train.devices"):
        device_of("auto")


@pytest.mark.parametrize("choice", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_taken_where_there_is_one_or_asked_for(choice, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    if choice == "cuda" and not there:
        with pytest.raises(TrainingError, match="device = cuda, .* no GPU.* device: auto"):
            device_of(choice)
    else:
        assert device_of(choice).type == ("cuda" if there and choice != "cpu" else "cpu")


@pytest.mark.parametrize("batching", ["aligned", "misaligned"])
def test_networks_are_trained_with_what_is_predicted_of_their_whole_meta_batch(batching):
    """Aligned, a prediction is the same whatever is predicted beside it; misaligned it is not."""
    torch.manual_seed(0)
    ghn = GHN({"hid": 16, "layers": 1, "heads": 2, "max_shape": (16, 16, 11, 11), "batching": batching})
    graphs = [architecture.graph for architecture in architectures()[:5]]

    def norm(*parts):
        predictions = [prediction for part in parts for prediction in ghn.predict(part)]
        return sum(float(p.detach().norm()) for prediction in predictions for p in prediction.values()) / len(graphs)

    whole, in_parts = norm(graphs), norm(graphs[:4], graphs[4:])
    assert (whole == pytest.approx(in_parts, rel=1e-5)) == (batching == "aligned")
    found = MetaTrainer(ghn, Recipe(meta_batch=5), 1).step(
        architectures()[:5], *next(digits().train.batches(8)), seed=0
    )
    assert found["parameter_norm"] == pytest.approx(whole, rel=1e-5)


def forked(function, *arguments):
    """A process that calls a function, started without importing anything anew."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def train_in_own_session(of):
    os.setsid()
    run_job(of, 1)


def test_a_killed_training_resumes_with_the_same_result(tmp_path):
    recipe = {"steps": 40, "validate_every": 40}
    torch.set_num_threads(1)  # as in processes of their own
    train_job(job(tmp_path / "whole", recipe))
    killed = job(tmp_path / "killed", recipe)
    caller = forked(train_in_own_session, killed)
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and caller.is_alive():
        time.sleep(0.05)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.join()
    assert last_checkpoint(tmp_path / "killed")["progress"]["step"] < 40
    resumed = run_job(killed, 1)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "whole" / "history.csv"), resumed, check_exact=True)


def test_no_more_processes_train_than_a_meta_batch_has_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_share", lambda folder, devices: train_job(job(folder, {"steps": devices})))
    assert [run_job(job(tmp_path / f"{n}", {"steps": 1}), n)["step"].max() for n in (1, 2, 3)] == [1, 2, 2]


def test_resumed_on_another_number_of_processes(tmp_path, monkeypatch):
    recipe = {"log_every": 1, "validate_every": 3, "lr": 1e-4}
    train_job(job(tmp_path / "whole", recipe))
    whole = pd.read_csv(tmp_path / "whole" / "history.csv")
    part = job(tmp_path / "part", recipe)

    def interrupt(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "validation_accuracy", interrupt)
        with pytest.raises(Interrupted):
            train_job(part)
    assert torch.load(tmp_path / "part" / "checkpoint.pt")["progress"]["step"] == 2
    resumed = run_job(part, 2)
    # The same networks and images in the same order; sums over networks are taken in another one.
    pd.testing.assert_frame_equal(whole[["loss", "parameter_norm"]], resumed[["loss", "parameter_norm"]], rtol=1e-3)


DURABLE = Recipe(steps=40, batch_size=8, meta_batch=2, log_every=2, validate_every=40)


def train_in_child(folder):
    torch.set_num_threads(1)
    train(folder, DURABLE)


def until_saved(path, before, child):
    """Wait for a checkpoint that is not the one before; returns its file number."""
    while (number := file_number(path)) in (None, before) and child.is_alive():
        time.sleep(0.002)
    return number


def test_killed_at_random_moments_it_continues_bit_for_bit(tmp_path):
    started = time.monotonic()
    train_in_child(tmp_path / "whole")
    seconds = time.monotonic() - started
    folder, last, moments = tmp_path / "killed", None, random.Random(0)
    for _ in range(4):  # each some time within the two steps after its first checkpoint, of 20 to come
        child = forked(train_in_child, folder)
        last = until_saved(folder / "checkpoint.pt", last, child)
        child.join(moments.uniform(0, seconds / 20))
        assert child.is_alive()
        child.kill()
        child.join()
    assert 0 < last_checkpoint(folder)["progress"]["step"] < DURABLE.steps
    train_in_child(folder)
    assert (folder / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()
    a, b = (torch.load(f / "checkpoint.pt") for f in (folder, tmp_path / "whole"))
    torch.testing.assert_close([a["ghn"], a["optimizer"]["state"]], [b["ghn"], b["optimizer"]["state"]], rtol=0, atol=0)
    assert a["progress"] == b["progress"]
    assert a["schedule"] == b["schedule"]


def interrupted_at(moment, folder, monkeypatch):
    """Train until ``moment`` effects on the disk of the second save have come, counting from 0; returns whether that
    was before the third save."""
    saves, effects = [], []

    def deadly(function):
        def call(*arguments, **options):
            saves.extend([function] if function.__name__ == "save" else [])
            effects.extend([function] if len(saves) == 2 else [])
            if len(effects) > moment or len(saves) > 2:
                raise Interrupted
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (pd.DataFrame, "to_csv")):
            patch.setattr(module, name, deadly(getattr(module, name)))
        with pytest.raises(Interrupted):
            train(folder)
    return len(saves) == 2


def test_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch):
    """At each moment between two effects on the disk, such as before, between and after the renames."""
    whole, _ = train(tmp_path / "whole")
    for moment in count():
        folder = tmp_path / str(moment)
        writing = interrupted_at(moment, folder, monkeypatch)
        resumed, _ = train(folder)
        assert_same_weights(whole, resumed)
        assert (folder / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()
        if not writing:
            break
    assert moment >= 4


def test_sigterm_saves_and_exits_143(tmp_path):
    train_in_child(tmp_path / "whole")
    child = forked(train_in_child, tmp_path / "part")
    while not (tmp_path / "part" / "checkpoint.pt").exists():
        time.sleep(0.01)
    child.terminate()
    child.join()
    assert child.exitcode == 143
    assert 1 <= torch.load(tmp_path / "part" / "checkpoint.pt")["progress"]["step"] < DURABLE.steps
    train_in_child(tmp_path / "part")
    assert (tmp_path / "part" / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()


def ranks_that_save(caller):
    """Ranks started by a process that have a handler of SIGTERM: they end a step and save before they stop."""
    commands = {}
    for child in psutil.Process(caller).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # torchrun starts some that end at once
            commands[child.pid] = child.cmdline()
    ranks = [pid for pid, words in commands.items() if JOBS in words and "torch.distributed.run" not in words]
    caught = [re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1] for pid in ranks]
    return sum(int(signals, 16) >> (signal.SIGTERM - 1) & 1 for signals in caught)


def test_processes_save_when_their_caller_is_killed(tmp_path):
    """No log line is due before the end: the checkpoint is the one that SIGTERM asked for."""
    caller = forked(run_job, job(tmp_path, {"steps": 10_000, "log_every": 10_000}), 2)
    deadline = time.monotonic() + 120
    try:
        while ranks_that_save(caller.pid) < 2:
            assert caller.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.join()
    with filelock.FileLock(tmp_path / "lock", timeout=30):
        assert 0 < torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] < 10_000


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["ghn"]["weight_decoder.fc.weight"].numpy().tobytes()) + 101] ^= 4
    path.write_bytes(content)


def zero_4_kilobytes(path):
    content = bytearray(path.read_bytes())
    start = content.index(torch.load(path)["ghn"]["weight_decoder.fc.weight"].numpy().tobytes())
    content[start : start + 4096] = bytes(4096)
    path.write_bytes(content)


def forget_a_key(path):
    torch.save({key: value for key, value in torch.load(path).items() if key != "schedule"}, path)


def forget_the_position(path):
    state = torch.load(path)
    del state["progress"]["position"]
    torch.save(state, path)


DAMAGES = [cut, flip_a_bit, zero_4_kilobytes, forget_a_key, forget_the_position, lambda path: torch.save([1], path),
           lambda path: path.write_bytes(pickle.dumps({"identity": 1})), lambda path: torch.save(Recipe(), path)]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    whole, history = train(tmp_path)
    path = tmp_path / "checkpoint.pt"
    damage(path)
    damaged = path.read_bytes()
    resumed, again = train(tmp_path)
    output = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in output and "resuming after step 9" in output
    assert_same_weights(whole, resumed)
    pd.testing.assert_frame_equal(history, again, check_exact=True)
    for name, last in ("checkpoint.pt", 12), ("checkpoint.previous.pt", 9):  # not the damaged one
        assert torch.load(tmp_path / name)["progress"]["step"] == last
    assert (tmp_path / "checkpoint.damaged.pt").read_bytes() == damaged
    assert len(pd.read_csv(tmp_path / "throughput.csv")) == 5


def test_the_checkpoint_of_other_layers_is_set_aside(tmp_path, capsys):
    whole, _ = train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    state["ghn"]["before"] = state["ghn"].popitem()[1]
    torch.save(state, tmp_path / "checkpoint.pt")
    again, _ = train(tmp_path)
    assert "starting anew" in capsys.readouterr().out
    assert_same_weights(whole, again)


def test_a_second_writer_is_kept_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpointing, "ENDING", 0.1)

    def second(ghn):
        train(tmp_path)
        return {}

    with pytest.raises(TrainingError, match="another process"):
        train(tmp_path, validate=second)
    assert "waiting 0.1 seconds" in capsys.readouterr().out


def test_losses_that_are_not_finite_stop_the_training(tmp_path):
    ghn = new_ghn()
    ghn.weight_decoder.conv2.bias.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        train(tmp_path, Recipe(steps=50, batch_size=8, meta_batch=2), ghn)


def test_losses_that_stop_being_finite_are_noticed_late_in_training():
    loop._stop_if_diverged([0] * 980 + [2] * 20, 2)
    with pytest.raises(TrainingError, match="42 of the last 2000"):
        loop._stop_if_diverged([0] * 979 + [2] * 21, 2)


def test_losses_far_above_guessing_stop_the_training_soon_after_its_warm_up():
    stop = loop._stop_if_worse_than_guessing
    high, wild = [5e14] * 100, [2.3] * 51 + [1e12] * 49  # as in healthy trainings: some networks lose very much
    for at, steps in (4, 4), (199, 199), (399, 2000), (60, 60), (499, 3000), (10_199, 100_000):
        stop(high[:at], at, Recipe(steps=steps), 10)
    for at, steps in (200, 200), (400, 2000), (1000, 2000), (2000, 2000), (500, 3000), (10_200, 100_000):
        stop(wild, at, Recipe(steps=steps), 10)
        for losses in high, [math.nan] * 100:
            with pytest.raises(TrainingError, match=f"after {at} of {steps} steps.*guessing has 2.3.*the recipe's lr"):
                stop(losses, at, Recipe(steps=steps), 10)


def test_what_may_recover_is_waited_for_until_the_middle():
    stop, poor = loop._stop_if_worse_than_guessing, [2e4] * 100
    stop(poor, 1499, Recipe(steps=3000), 10)
    with pytest.raises(TrainingError, match=r"limit: 30 times"):
        stop(poor, 1500, Recipe(steps=3000), 10)
    with pytest.raises(TrainingError, match=r"limit: 10000 times"):
        stop([2.4e4] * 100, 1499, Recipe(steps=3000), 10)
    stop(poor, 1499, Recipe(steps=3000, warmup=1.0), 10)


def test_a_training_that_diverges_with_finite_losses_fails(tmp_path, monkeypatch):
    update = MetaTrainer.step
    monkeypatch.setattr(MetaTrainer, "step", lambda *a, **k: update(*a, **k) | {"loss": 5e14})
    monkeypatch.setattr(loop, "SETTLED", 8)
    monkeypatch.setattr(loop, "JUDGED", 4)
    for _ in range(2):  # started again, it fails again
        with pytest.raises(TrainingError, match="the training has diverged: after (8|10) of 12 steps"):
            train(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 6


def test_a_short_training_without_a_finite_loss_fails(tmp_path, monkeypatch):
    update = MetaTrainer.step
    monkeypatch.setattr(MetaTrainer, "step", lambda *a, **k: update(*a, **k) | {"loss": math.nan})
    with pytest.raises(TrainingError, match="none of the last 12 steps has a finite loss: lower the recipe's lr"):
        train(tmp_path)


def test_a_step_without_an_update_leaves_the_mean_gradient_norm_finite(tmp_path, monkeypatch):
    update, norms = MetaTrainer.step, iter([math.inf, 1.0, 3.0])
    monkeypatch.setattr(MetaTrainer, "step", lambda *a, **k: update(*a, **k) | {"grad_norm": next(norms)})
    _, history = train(tmp_path, replace(SHORT, steps=3))
    assert history["grad_norm"].tolist() == [2.0] and history["grad_norm_deviation"].tolist() == [1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad_one", [0, 1])
def test_a_bad_network_is_left_out_and_counted(monkeypatch, bad_one, what, value):
    trainer = MetaTrainer(new_ghn(), SHORT, 1)
    run = trainer._run_child
    bad = architectures()[bad_one]

    def damaged(architecture, *rest):
        found, gradients = run(architecture, *rest)
        if architecture is bad:
            (found if what == "loss" else gradients[-1]).view(-1)[0] = value
        return found, gradients

    monkeypatch.setattr(trainer, "_run_child", damaged)
    images, labels = next(digits().train.batches(8))
    result = trainer.step(architectures()[:2], images, labels, seed=0)
    assert result["skipped"] == 1 and result["loss"] > 0
    good = MetaTrainer(new_ghn(), SHORT, 1)
    add = good._add_gradients

    def without(networks, mine, *rest):
        used = [networks[i] is not bad for i in mine]
        return add(networks, list(compress(mine, used)), *rest)[0], used

    good._add_gradients = without
    alone = good.step(architectures()[:2], images, labels, seed=0)
    assert alone == result
    for ours, expected in zip(trainer.ghn.parameters(), good.ghn.parameters()):
        assert torch.equal(ours, expected)


def test_without_any_finite_network_there_is_no_loss_and_no_update(monkeypatch):
    trainer = MetaTrainer(new_ghn(), SHORT, 1)
    run = trainer._run_child
    monkeypatch.setattr(trainer, "_run_child", lambda *a: (torch.full((3,), math.inf), run(*a)[1]))
    before = [p.detach().clone() for p in trainer.ghn.parameters()]
    result = trainer.step(architectures()[:2], *next(digits().train.batches(8)), seed=0)
    assert result["skipped"] == 2 and math.isnan(result["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.ghn.parameters()))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    recipe = Recipe(steps=3, batch_size=8, meta_batch=2, log_every=3)
    train(tmp_path, recipe)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match="cannot write a checkpoint"):
            train(tmp_path, replace(recipe, lr=1e-5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.old.pt").read_bytes() == before  # of another learning rate
    assert not (tmp_path / "checkpoint.new").exists()


def test_meta_batches_are_drawn_without_replacement_and_within_the_node_limit():
    recipe = Recipe(meta_batch=3)
    drawn, position = [], 0
    for _ in range(len(architectures()) // 3):
        chosen, position = sample_meta_batch(architectures(), recipe, 0, position)
        drawn += chosen
    assert {id(a) for a in drawn} == {id(a) for a in architectures()}
    limit = max(len(a.graph) for a in architectures()) // 3  # a limit for meta-batches of eight holds for smaller ones
    assert sample_meta_batch(architectures(), Recipe(meta_batch=2, max_nodes=limit), 0, 0)[1] == 1
    with pytest.raises(TrainingError, match="max_nodes=1 "):
        sample_meta_batch(architectures(), Recipe(meta_batch=3, max_nodes=1), 0, 0)
    with pytest.raises(TrainingError, match="meta_batch=99"):
        sample_meta_batch(architectures(), Recipe(meta_batch=99), 0, 0)


def test_a_share_of_the_networks_is_ones_own_and_moves_no_other_draw():
    own = architectures()
    extra = own_networks([f"ghnlib.architectures.handwritten:{name}" for name in ("vgg", "vit")], 10, 16)
    drawn = lambda share, extra=extra: [
        sample_meta_batch(own, replace(SHORT, extra_share=share), 0, position, extra)[0] for position in range(200)
    ]
    without, some = drawn(0.0), drawn(0.2)
    assert without == drawn(0.0, []) and some == drawn(0.2)
    pairs = [pair for batches in zip(without, some) for pair in zip(*batches)]
    counts = [sum(b == network for _, b in pairs) for network in extra]
    assert all(a == b or b in extra for a, b in pairs)
    assert 0.15 * len(pairs) < sum(counts) < 0.25 * len(pairs) and min(counts) > sum(counts) / 3


def test_a_training_with_networks_of_ones_own(tmp_path, capsys):
    names = ["ghnlib.architectures.handwritten:resnet", "small-swin"]
    deepnets, share = JOB["deepnets"] | {"extra": names}, {"extra_share": 1.0}
    whole = train_job(job(tmp_path / "whole", share, deepnets=deepnets))
    again = train_job(job(tmp_path / "again", share | {"steps": 6}, deepnets=deepnets))
    assert_same_weights(whole, again)
    train_job(job(tmp_path / "again", share, deepnets=deepnets | {"extra": names[:1]}))
    assert "starting anew" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="extra_share=1.0: there are no networks to draw from"):
        train_job(job(tmp_path / "none", share))


def test_recipes_of_the_papers():
    names = [("cifar10", "ghn1"), ("cifar10", "ghn2"), ("imagenet", "ghn3")]
    ghn1, ghn2, ghn3 = recipes = [params(profile).train.recipe_of(name) for profile, name in names]
    epochs = (0, 199, 200, 250)
    assert [1e-3 * ghn2.rate_factor(703 * e, 703) for e in epochs] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    assert (ghn2.optimizer, ghn2.weight_decay, ghn2.batch_size, ghn2.gamma) == ("adam", 1e-5, 64, 0)
    assert (ghn1.meta_batch, ghn2.meta_batch, ghn3.meta_batch) == (1, 8, 8)
    rates = [4e-4 * ghn3.rate_factor(9600 * e, 9600) for e in range(7)]
    assert rates == pytest.approx([1e-5, 1.075e-4, 2.05e-4, 3.025e-4, 3.998e-4, 4e-4, 3.998e-4], rel=1e-3)
    assert (ghn3.optimizer, ghn3.weight_decay, ghn3.batch_size, ghn3.gamma) == ("adamw", 1e-2, 128, 3e-5)
    assert ghn3.label_smoothing == 0.1 and all(recipe.clip == 5 for recipe in recipes)
    assert ghn2.max_nodes * ghn2.meta_batch == ghn3.max_nodes * ghn3.meta_batch == 2200


def test_training_can_be_limited_to_the_first_architectures():
    pool = DeepNets("train", space="small", size=12)
    recipe = Recipe(meta_batch=2, architectures=4)
    first, drawn, position = set(list(pool)[:4]), set(), 0
    for _ in range(4):
        chosen, position = sample_meta_batch(pool, recipe, 0, position)
        drawn |= set(chosen)
    assert drawn == first
    for wrong in (1, 13):
        with pytest.raises(TrainingError, match=f"architectures={wrong}.*there are 12"):
            sample_meta_batch(pool, replace(recipe, architectures=wrong), 0, 0)
