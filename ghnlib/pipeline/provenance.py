"""Where the reports of a run come from: code, parameters, versions, processor, time; no names of users or machines.

Kept beside what the stages write (reports/PROFILE/provenance.json), not in it: equal runs give equal reports.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ghnlib.params import Params
from ghnlib.pipeline.notebooks import write_text

PACKAGES = ("ghnlib", "torch", "torchvision", "numpy")


def code_of(root: Path) -> dict[str, Any]:
    """The commit of a folder, and whether all but what a run makes is as committed; None where there is no git."""
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", ".", ":!reports", ":!dvc.lock")
    return {"commit": commit, "clean": None if changed is None else not changed}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.strip()


def record(folder: Path, params: Params, code: Mapping[str, Any], seconds: float, ran: int, stages: int) -> None:
    """Write reports/PROFILE/provenance.json of a run in a folder.

    Args:
        code: ``code_of`` the repository when the run began.
        seconds: of the whole run.
        ran, stages: of how many stages ran, of how many; the others' results are of earlier runs.
    """
    import torch  # the pipeline does without, and it takes seconds

    device = params.device != "cpu" and torch.cuda.is_available()
    merged = json.dumps(params.model_dump(mode="json"), sort_keys=True)
    found = {
        **code,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds),
        "stages_run": f"{ran} of {stages}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "processor": {
            "name": _processor(),
            "cores": os.cpu_count(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
        },
        "device": torch.cuda.get_device_name() if device else "cpu",
        "threads": {"processes": params.processes, "of_each": 1},
        "parameters": hashlib.sha256(merged.encode()).hexdigest()[:16],
        "seeds": {"data": params.seed, "train": list(params.train.seeds)},
    }
    write_text(json.dumps(found, indent=1) + "\n", folder / "reports" / params.profile / "provenance.json")


def _processor() -> str:
    """Its name; Python's own word for it is the architecture alone on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def in_words(found: Mapping[str, Any]) -> str:
    """A sentence for the foot of a page."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    state = {True: "", False: " with changes that were not committed", None: ""}[found["clean"]]
    processor, minutes = found["processor"], max(1, round(found["seconds"] / 60))
    commit = f"commit {found['commit'][:10]}" if found["commit"] else "code without a commit"
    return (
        f"Made from {commit}{state} on {found['date']}: {found['stages_run']} stages in {minutes} min, "
        f"{processor['name']} ({processor['cores']} cores, {processor['vectors']}; device {found['device']}), "
        f"{found['threads']['processes']} processes of one thread; {versions}; parameters {found['parameters']}, "
        f"seeds {found['seeds']['data']} and {found['seeds']['train']}."
    )
