"""What a killed run leaves behind: processes that save before they end, locks that nobody holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

WORKERS = {"dvc", "ghnlib.pipeline.run", "ghnlib.training.jobs"}


def clear_away(folder: Path) -> None:
    """Wait for DVC and stages that work in a folder, then remove DVC's locks that no process holds; both are told."""
    if others := at_work(folder):
        numbers = ", ".join(str(process.pid) for process in others)
        print(f"waiting for the end of DVC or of an earlier run in {folder} (processes {numbers})", flush=True)
        psutil.wait_procs(others)
    rwlock = folder / ".dvc" / "tmp" / "rwlock"
    with suppress(FileNotFoundError):
        owners = _owners(rwlock.read_bytes())
        if owners is None or (owners and not any(map(_is_dvc, owners))):
            rwlock.unlink()
            print(f"removed {rwlock}: {'damaged' if owners is None else 'its processes have ended'}", flush=True)


def at_work(folder: Path) -> list[psutil.Process]:
    """DVC, stages and trainings that run in a folder."""
    return [process for process in psutil.process_iter() if _works_in(process, folder)]


def _works_in(process: psutil.Process, folder: Path) -> bool:
    with suppress(psutil.Error):
        return _is_worker(process.cmdline()) and Path(process.cwd()) == folder.resolve()
    return False


def _is_worker(words: Sequence[str]) -> bool:
    names = [Path(word).name for word in words[:5]]
    return bool(names) and names[0].startswith("python") and not WORKERS.isdisjoint(names)


def _is_dvc(number: int) -> bool:
    with suppress(psutil.Error):
        return _is_worker(psutil.Process(number).cmdline())
    return False


def _owners(text: bytes) -> list[int] | None:
    """Numbers of the processes that DVC's file of read and write locks names; None if it is no such file."""
    try:
        content = json.loads(text)
        return [int(owner["pid"]) for kind in ("read", "write") for owner in _each(content.get(kind, {}))]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _each(locks: dict) -> Iterator[dict]:
    for owners in locks.values():
        yield from owners if isinstance(owners, list) else [owners]
