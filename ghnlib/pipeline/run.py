"""Runs one stage of the pipeline: ``python -m ghnlib.pipeline.run STAGE[@VARIANT-SEED]``; ``job@VARIANT-SEED`` writes
the file by which several nodes run a training together.

A stage is a notebook executed with the validated parameters of params.yaml. The executed notebook goes to
reports/PROFILE/, its HTML to site/PROFILE/. ``sources`` is the first stage.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's check of web addresses: 1.5 s to import, unused here

import filelock
import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from ghnlib.params import Params
from ghnlib.params_file import ParamsError, check_starts, read_yaml, validate
from ghnlib.pipeline import notebooks
from ghnlib.pipeline.notebooks import NOTEBOOKS, NotebookError, label
from ghnlib.pipeline.page import page
from ghnlib.pipeline.taking_back import take_back
from ghnlib.processes import stop_with

SOURCES = Path(".sources")
# Errors whose message is written for the reader: no traceback is shown.
CLEAR_ERRORS = ("DataError", "TrainingError", "CheckpointError", "ParamsError", "TraceError")


class StageError(Exception):
    """A stage that cannot be run or has failed; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Run a stage; the exit status is 0, 1 (failed), 2 (bad parameters or stage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "DVC_STAGE" in os.environ:
        stop_with(os.getppid())  # nobody would record what a runner makes after DVC has gone
    if pipeline := os.environ.get("GHNLIB_PIPELINE"):
        stop_with(int(pipeline))  # nor go on from there
    stage, _, training = (arguments[0] if len(arguments) == 1 else "").partition("@")
    try:
        _run(stage, training, _read_params())
        return 0
    except (ParamsError, NotebookError, StageError) as error:
        said = take_back() if isinstance(error, ParamsError) and "DVC_EXP_BASELINE_REV" in os.environ else ""
        message, status = f"{error}{said}", 1 if isinstance(error, StageError) else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message, status = _disk_full(str(error)), 1
    except KeyboardInterrupt:
        message, status = "interrupted; started again, it resumes.", 130
    print(f"\n{stage}: {message}" if stage else message, file=sys.stderr)
    return status


def _run(stage: str, training: str, params: Params) -> None:
    if stage == "sources":
        check_starts(params, params.train.trainings)
        write_sources()
    elif stage not in (*NOTEBOOKS, "job"):
        raise ParamsError(f"no stage named {stage!r}; there are sources, {', '.join(NOTEBOOKS)}")
    elif (stage in ("train", "job")) != bool(training) or (training and training not in params.train.trainings):
        names = ", ".join(f"train@{name}" for name in params.train.trainings)
        raise ParamsError(
            f"no stage named {stage}{'@' * bool(training)}{training}; hypernetworks are trained by {names}"
        )
    elif stage == "job":
        write_job(training, params)
    else:
        run_notebook(stage, training, params)


def _read_params() -> Params:
    if not Path("params.yaml").exists():
        raise ParamsError("there is no params.yaml here: run stages in the root of the repository")
    return validate(read_yaml("params.yaml"))


def write_sources() -> None:
    """Notebooks as the stages depend on them: saving one in Jupyter changes nothing here."""
    for name in NOTEBOOKS.values():
        notebooks.write(notebooks.clean(notebooks.read(Path("notebooks", f"{name}.ipynb"))), SOURCES / f"{name}.ipynb")


def write_job(training: str, params: Params) -> None:
    """Have the ``job.json`` of a training written, by which several nodes run it; its stage goes on from there."""
    _forget_other_code(Path(available("train", training, params)["folder"]))
    subprocess.run([sys.executable, "-m", "ghnlib.experiments.train", training], check=True)  # pipelines need no torch


def available(stage: str, training: str, params: Params) -> dict[str, Any]:
    """Everything a notebook may ask for in its parameters cell, as plain values."""
    values = params.model_dump(mode="json", exclude_unset=True)
    variant, seed = params.train.trainings.get(training, ("", None))
    if training:
        values["train"] |= {"variants": {variant: values["train"]["variants"][variant]}, "seeds": [seed]}
    folder = Path(".training", params.profile, label(stage, training))
    return {**values, "variant": variant, "training_seed": seed, "folder": str(folder)}


def parameters_for(stage: str, training: str, params: Params, source: Path) -> dict[str, Any]:
    """The values of the names in the notebook's parameters cell, as plain Python. Raises NotebookError for others."""
    values = available(stage, training, params)
    names = papermill.inspect_notebook(str(source))
    unknown = sorted(set(names) - set(values))
    missing = sorted({"profile", "seed", stage if stage in values else "seed"} - set(names))
    if unknown or missing:
        raise NotebookError(
            f"{source}: the cell tagged 'parameters' has unknown names ({', '.join(unknown) or 'none'}) or lacks some "
            f"({', '.join(missing) or 'none'}); there are {', '.join(sorted(values))}."
        )
    return {name: values[name] for name in names}


def run_notebook(stage: str, training: str, params: Params) -> None:
    """Execute a stage's notebook; its report replaces the earlier one only if it succeeds."""
    started, source, name = time.monotonic(), SOURCES / f"{NOTEBOOKS[stage]}.ipynb", label(NOTEBOOKS[stage], training)
    site, reports = Path("site", params.profile), Path("reports", params.profile)
    values = parameters_for(stage, training, params, source)
    _forget_other_code(Path(available(stage, training, params)["folder"]))
    for folder in site, reports / "metrics":
        folder.mkdir(parents=True, exist_ok=True)
    report = notebooks.normalise(_execute(source, site / f"{name}.ipynb", values), Path.cwd())
    seconds = time.monotonic() - started
    notebooks.write(report, reports / f"{name}.ipynb")
    links = {path.stem: path.name for path in sorted(site.glob("*.html"))}  # all of a run: ``make report``
    notebooks.write_text(page(report, name, seconds, links), site / f"{name}.html")
    _record_seconds(reports / "timing.json", label(stage, training), seconds)


def _forget_other_code(folder: Path) -> None:
    """Results that a stage has kept are those of the same code: after an edit of it they are computed anew. An edit of
    a notebook, a figure or a claim is none."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path("ghnlib").rglob("*.py")):
        if path.parts[1] not in ("reporting", "pipeline", "__main__.py"):
            code.update(path.read_bytes())
    stamp = folder / "code"
    if not (stamp.exists() and stamp.read_text() == code.hexdigest()):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(code.hexdigest())


def _execute(source: Path, progress: Path, values: dict[str, Any]) -> nbformat.NotebookNode:
    with _own_kernel() as kernel:
        try:
            return papermill.execute_notebook(
                str(source), str(progress), values, kernel_name="python3", cwd=str(Path.cwd()), progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stderr, shutdown_kernel="immediate", config=kernel,
            )  # fmt: skip
        except PapermillExecutionError as error:
            raise StageError(_explain(error, progress)) from None
        except DeadKernelError:
            raise StageError("the notebook's process died (out of memory?); started again, it resumes.") from None


def _explain(error: PapermillExecutionError, progress: Path) -> str:
    if "No space left on device" in error.evalue or "Disk quota exceeded" in error.evalue:
        return _disk_full(error.evalue)
    if error.ename in CLEAR_ERRORS:
        return error.evalue
    trace = "\n".join(error.traceback)
    return f"{trace}\n(in cell {error.exec_count}; the notebook so far: {progress})"


def _disk_full(message: str) -> str:
    return f"the disk is full ({message}). Earlier reports are intact; free some space and start again."


@contextmanager
def _own_kernel() -> Iterator[Config]:
    """A python3 kernel that is this interpreter and sees this folder's ghnlib, whatever else is installed, then the
    modules of one's own beside the pipeline above, of which this may be a profile's run. It is reached by sockets in a
    folder of its own: stages that start at the same moment may draw the same port."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        write_kernel_spec(str(Path(folder, "kernels", "python3")), extra_arguments=["--log-level=40"])
        above = (str(folder) for folder in Path.cwd().parents if (folder / "dvc.yaml").exists())
        paths = filter(None, [str(Path.cwd()), *above, os.environ.get("PYTHONPATH")])
        os.environ |= {"JUPYTER_PATH": folder, "IPYTHONDIR": folder, "PYTHONPATH": os.pathsep.join(paths)}
        # One thread: the order of sums, and so the report, does not depend on how many cores are free.
        os.environ |= {"PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "OMP_NUM_THREADS": "1"}
        yield Config(KernelManager={"transport": "ipc", "ip": str(Path(folder, "kernel"))})


def _record_seconds(path: Path, name: str, seconds: float) -> None:
    Path(".training").mkdir(exist_ok=True)
    with filelock.FileLock(".training/timing.lock"):  # stages end side by side
        times = json.loads(path.read_text()) if path.exists() else {}
        notebooks.write_text(json.dumps(times | {name: round(seconds, 1)}, indent=1, sort_keys=True) + "\n", path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
