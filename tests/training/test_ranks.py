"""Several ranks of torchrun: one is killed, comes late or sees another folder; sums of gradients."""

import math
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from shared import JOB, file_number, last_checkpoint
from torch import distributed, multiprocessing

from ghnlib.training import ranks
from ghnlib.training.jobs import Job

RECIPE = JOB["recipe"] | {"steps": 200, "meta_batch": 3, "log_every": 5, "validate_every": 200}
RANK = "ghnlib.training.jobs"


def written(folder, **recipe):
    """The file of the training of ``JOB`` by ``RECIPE`` in a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "job.json"
    path.write_text(Job.of(JOB | {"recipe": RECIPE | recipe, "folder": str(folder)}).model_dump_json())
    return path


def torchrun(job, processes, *nodes):
    """torchrun on one node, or on one of several that ``nodes`` describe."""
    nodes = nodes or ("--standalone",)
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc-per-node={processes}", "-m", RANK, job]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def ended(process, seconds=120):
    """Its output and status; it must end by itself."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return output, process.returncode


def until_saved(folder, process):
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_any_number_resumes(tmp_path):
    folder = tmp_path / "training"
    job = written(folder)
    for processes, killed in (2, True), (1, True), (3, False):
        process = torchrun(job, processes)
        if killed:
            before = file_number(folder / "checkpoint.pt")
            until_saved(folder, process)
            while file_number(folder / "checkpoint.pt") in (None, before) and process.poll() is None:
                time.sleep(0.005)
            children = psutil.Process(process.pid).children(recursive=True)
            found = [child for child in children if RANK in child.cmdline() and child.pid != process.pid]
            found[-1].send_signal(signal.SIGKILL)
            output, status = ended(process)
            assert status != 0 and 0 < last_checkpoint(folder)["progress"]["step"] < 200
        else:
            output, status = ended(process)
            assert status == 0, output
            assert "resuming after step" in output
    history = pd.read_csv(folder / "history.csv")
    assert history["step"].tolist() == list(range(5, 201, 5))
    assert history["loss"].map(math.isfinite).all() and history["grad_norm"].map(math.isfinite).all()


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def two_nodes():
    return "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint=localhost:{free_port()}"


@pytest.mark.slow
def test_a_node_that_starts_late_is_waited_for(tmp_path):
    job, nodes = written(tmp_path / "training", steps=4), two_nodes()
    first = torchrun(job, 1, *nodes)
    time.sleep(5)
    assert first.poll() is None and not (tmp_path / "training" / "history.csv").exists()
    second = torchrun(job, 1, *nodes)
    for output, status in (ended(first), ended(second)):
        assert status == 0, output
    assert pd.read_csv(tmp_path / "training" / "history.csv")["step"].tolist() == [4]


@pytest.mark.slow
def test_a_folder_that_one_rank_sees_is_named(tmp_path):
    """Two nodes with folders of the same name but of their own, of which one holds a checkpoint."""
    trained = written(tmp_path / "trained", steps=4)
    ended(torchrun(trained, 1))
    nodes, other = two_nodes(), written(tmp_path / "empty", steps=4)
    outputs = [ended(process) for process in (torchrun(trained, 1, *nodes), torchrun(other, 1, *nodes))]
    assert all(status for _, status in outputs)
    assert all("TrainingError: the first process would start after step 4" in output for output, _ in outputs)


def summed(rank, file, results):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((3, 2), (5,), (4, 3), (2,))]
    for i, parameter in enumerate(parameters[:-1]):
        if rank or i:
            parameter.grad = torch.full_like(parameter, 10.0**i * (rank + 1))
    where = [p.grad.data_ptr() if p.grad is not None else None for p in parameters]
    ranks.SMALL = 6
    ranks.sum_gradients(parameters)
    same = [p.grad.data_ptr() == before for p, before in zip(parameters, where) if before]
    results[rank] = [p.grad.flatten().tolist() for p in parameters], all(same)
    distributed.destroy_process_group()


def test_gradients_of_any_size_are_summed_in_place(tmp_path):
    results = multiprocessing.Manager().dict()
    multiprocessing.spawn(summed, (tmp_path / "rendezvous", results), nprocs=2)
    expected = [[2.0] * 6, [30.0] * 5, [300.0] * 12, [0.0] * 2]
    assert results.values() == [(expected, True)] * 2
