"""Runs the pipeline at another scale: ``python -m ghnlib.profiles NAME``.

The run has a folder of its own, runs/NAME, with a copy of the code, the merged params.yaml and its own DVC state; edits
made meanwhile do not reach it and the tree stays clean. Its reports come back to reports/NAME.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import filelock
from ruamel.yaml import YAML

from ghnlib.params import ParamsError, read_merged, validate

COPIED = ("ghnlib", "notebooks", "dvc.yaml", ".dvcignore", "matplotlibrc")
CONFIG = "[core]\n    no_scm = true\n    analytics = false\n"


def main(arguments: Sequence[str]) -> int:
    """Run a profile in its folder; the exit status is DVC's, or 2 if the profile cannot be run."""
    root = Path.cwd()
    try:
        folder = run_folder(root, arguments[0] if len(arguments) == 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            prepare(root, folder)
            status = _reproduce(folder)
            if status == 0:
                _bring_back(root, folder)
            return status
    except ParamsError as error:
        print(error, file=sys.stderr)
    except filelock.Timeout:
        print(f"this profile is already running in {folder.relative_to(root)}", file=sys.stderr)
    return 2


def run_folder(root: Path, name: str) -> Path:
    """Folder of a profile's run; the profile must exist."""
    names = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    if name not in names:
        raise ParamsError(f"no profile named {name!r}; there are {', '.join(names)}, and the default: make repro")
    return root / "runs" / name


def prepare(root: Path, folder: Path) -> None:
    """Copy the code and write the merged parameters; outputs of an earlier run stay, DVC sees what has changed."""
    overlay = root / "profiles" / f"{folder.name}.yaml"
    raw = read_merged(root / "params.yaml", overlay)
    validate(raw, f"profiles/{overlay.name}")
    data_root = raw["data"]["root"]
    if data_root and not Path(data_root).is_absolute():
        raw["data"]["root"] = str(Path("..", "..", data_root))  # seen from the run folder
    for name in COPIED:
        _copy(root / name, folder / name)
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # variants keep their order in tables
    yaml.dump(raw, folder / "params.yaml")
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc" / "config").write_text(CONFIG)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    elif source.exists():
        shutil.copy2(source, target)


def _reproduce(folder: Path) -> int:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=os.environ | {"PATH": path})
    # Ctrl-C reaches DVC and the stage by itself; here we only wait for them.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait() % 256


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
