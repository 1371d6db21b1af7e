"""Runs the pipeline: ``dvc repro``, with stages that do not need each other side by side.

``python -m ghnlib.pipeline.profiles`` runs it here, ``python -m ghnlib.pipeline.profiles NAME`` at another scale
(profiles/NAME.yaml) in a folder of its own, runs/NAME, with a copy of the code, the merged params.yaml and its own DVC
state; edits made meanwhile do not reach it and the tree stays clean. Its reports come back to reports/NAME.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
from ruamel.yaml import YAML

from ghnlib.params import Params
from ghnlib.params_file import ParamsError, is_path, read_merged, read_yaml, validate
from ghnlib.pipeline.claims import agreement
from ghnlib.pipeline.leftovers import at_work, clear_away
from ghnlib.pipeline.notebooks import label
from ghnlib.pipeline.progress import Progress
from ghnlib.pipeline.provenance import code_of, record
from ghnlib.processes import sole_holder

COPIED = ("ghnlib", "notebooks", "dvc.yaml", ".dvcignore", "requirements.lock")
CONFIG = "[core]\n    no_scm = true\n    analytics = false\n"
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(192 << 20)}
"""glibc keeps the memory of freed activations: taking pages anew at each layer costs a tenth to a third of its time.
Less than the 300 MB by which a worker of joblib may grow before it is replaced."""

ENDING = 30
"""Seconds that a pipeline is given to end before another is refused."""

ONE_CORE = {"JOBLIB_MULTIPROCESSING": "0"}
"""Makes joblib work in the stage's own process: as many stages as cores side by side need no more processes."""


def main(arguments: Sequence[str]) -> int:
    """Run the pipeline here or a profile's in its folder; returns DVC's exit status, or 2 if it cannot be run."""
    root, code, began = Path.cwd(), code_of(Path.cwd()), time.monotonic()
    try:
        folder = run_folder(root, *arguments)
        (folder / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
        with sole_holder(folder / ".dvc" / "tmp" / "pipeline.lock", f"the pipeline in {folder}", ENDING, print):
            clear_away(folder)
            if folder != root:
                prepare(root, folder)
            params = validate(read_yaml(folder / "params.yaml"))
            status, ran, stages = reproduce(folder, params)
            if status:
                return status
            if ran:
                record(folder, params, code, time.monotonic() - began, ran, stages)
            if folder != root:
                _bring_back(root, folder)
            print(compared_with_committed(root, params.profile))
            return 0
    except ParamsError as error:
        print(error, file=sys.stderr)
    except filelock.Timeout:
        numbers = ", ".join(str(process.pid) for process in at_work(folder))
        print(f"the pipeline is already running in {folder}: processes {numbers or 'none'} at work", file=sys.stderr)
    except OSError as error:
        print(f"{error}: the pipeline needs to write here, or in a copy of this folder", file=sys.stderr)
    except KeyboardInterrupt:  # before the first stage; later the stages are interrupted, not this
        return 130
    return 2


def run_folder(root: Path, name: str = "", *more: str) -> Path:
    """Folder of a profile's run, ``root`` if there is no name. Raises ParamsError if there is no such profile."""
    if not name:
        return root
    names = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    if more or name not in names:
        asked = " ".join((name, *more))
        raise ParamsError(f"no profile named {asked!r}; there are {', '.join(names)}, and the default: make repro")
    return root / "runs" / name


def prepare(root: Path, folder: Path) -> None:
    """Copy the code and write the merged parameters; outputs of an earlier run stay, DVC sees what has changed. Raises
    ParamsError for a wrong profile."""
    overlay = root / "profiles" / f"{folder.name}.yaml"
    raw = read_merged(root / "params.yaml", overlay)
    params = validate(raw, f"profiles/{overlay.name}")
    if params.profile != folder.name:
        raise ParamsError(f"profiles/{overlay.name}: profile = {params.profile!r}: must be {folder.name}, as the file")
    raw = _roots_from_run_folder(raw)
    variants = raw["train"]["variants"]
    for variant, seed in params.train.trainings.values():
        if (start := params.train.start_of(variant, seed)) and is_path(start, root):
            variants[variant]["start_from"] = _from_run_folder(params.train.variants[variant].start_from)
    raw["deepnets"]["path"] = _from_run_folder(raw["deepnets"]["path"])
    for name in COPIED:
        _copy(root / name, folder / name)
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # variants keep their order in tables
    yaml.dump(raw, folder / "params.yaml")
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc" / "config").write_text(CONFIG)


def _roots_from_run_folder(value: Any, key: str = "") -> Any:
    """Parameters with the folder of every dataset, in whatever section the key ``root`` is."""
    if isinstance(value, dict):
        return {name: _roots_from_run_folder(item, name) for name, item in value.items()}
    return _from_run_folder(value) if key == "root" else value


def _from_run_folder(path: str | None) -> str | None:
    return str(Path("..", "..", path)) if path and not Path(path).is_absolute() else path


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    elif source.exists():
        shutil.copy2(source, target)


def reproduce(folder: Path, params: Params) -> tuple[int, int, int]:
    """``dvc repro`` of a folder; independent stages run side by side first, as many as ``processes`` allow.

    After a stage that fails no other is started.

    Returns:
        The first exit status that is not 0, how many stages ran (the others were up to date), and of how many.
    """
    groups = independent_stages(params)
    side_by_side = max(1, params.processes // params.train.devices)
    changed = _Runs(folder).start("status", "--quiet")
    stages = [*(stage for group in groups for stage in group), "claims"]
    progress = Progress(stages if changed else ["claims"], seconds_of_stages(folder, params), side_by_side)
    runs = _Runs(folder, progress)
    # Ctrl-C reaches DVC and the stages by itself; here we only wait for them.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: runs.terminate())
    start = lambda stage, one_core: runs.start("repro", "--single-item", stage, stage=stage, one_core=one_core)
    if changed:
        for group in groups:
            one_core = repeat(params.processes <= len(group))
            with ThreadPoolExecutor(side_by_side) as pool:
                list(pool.map(start, group, one_core))
    status = runs.start("repro", stage="claims")  # and whatever else dvc.yaml has
    return status, len(progress.started), len(stages)


def seconds_of_stages(folder: Path, params: Params) -> dict[str, float]:
    """What stages took in the last run in a folder, by the names that DVC has for them; empty where there was none."""
    timing = folder / "reports" / params.profile / "timing.json"
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    names = {label("train", name): f"train@{name}" for name in params.train.trainings}
    return {names.get(name, name): value for name, value in seconds.items()}


def independent_stages(params: Params) -> tuple[list[str], ...]:
    """Names of the long stages, in groups: those of one group do not need each other, the longest begin. The last, as
    long as two others, is alone and has all cores."""
    trained = [f"train@{name}" for name in params.train.trainings]
    return ["sources"], ["anytime", "transfer", *trained, "architectures"], ["finetune", "analysis"], ["evaluate"]


class _Runs:
    """DVC commands in a folder; ``status``: the first exit status that was not 0, after which none is started."""

    def __init__(self, folder: Path, progress: Progress | None = None):
        self.folder, self.progress, self.status = folder, progress, 0
        self.processes: set[subprocess.Popen] = set()
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        self.environment = ALLOCATOR | os.environ | {"PATH": path, "GHNLIB_PIPELINE": str(os.getpid())}

    def start(self, *arguments: str, stage: str = "", one_core: bool = False) -> int:
        """Run a command to its end. ``stage``: that it runs, whose progress is told. ``one_core``: see ONE_CORE."""
        if self.status:
            return self.status
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if stage else {}
        environment = self.environment | (ONE_CORE if one_core else {})
        with subprocess.Popen(command, cwd=self.folder, env=environment, **pipes) as process:
            self.processes.add(process)
            ran = False
            for line in process.stdout or ():
                if line.startswith("Running stage"):
                    ran = True
                    self.progress.begin(stage)
                self.progress.read(stage, line.rstrip())
        self.processes.discard(process)
        self.status = self.status or process.returncode % 256
        if stage and not self.status:
            self.progress.end(stage, ran)
        return self.status

    def terminate(self) -> None:
        for process in tuple(self.processes):
            process.terminate()


def compared_with_committed(root: Path, profile: str) -> str:
    """A line on how a run's claims agree with the committed ones of the profile."""
    path = f"reports/{profile}/claims.csv"
    committed = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=root, capture_output=True, text=True)
    own = f"Your results: reports/{profile} (make report: as pages in site/{profile})."
    if committed.returncode:
        return f"{own} No committed ones to compare with."
    agreeing = agreement(pd.read_csv(io.StringIO(committed.stdout)), pd.read_csv(root / path))
    return (
        f"{own} Where this machine rounds differently, reports, metrics and dvc.lock differ from the committed ones; "
        f"git shows them as changed (git checkout reports dvc.lock takes them back). Compared with those, {agreeing}."
    )


def _bring_back(root: Path, folder: Path) -> None:
    for kind in "reports", "site":
        source, target = folder / kind / folder.name, root / kind / folder.name
        if source.exists():
            new = target.with_name(f".{folder.name}.new")
            _copy(source, new)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
