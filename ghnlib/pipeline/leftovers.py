"""What a killed run leaves behind: processes that save before they end, locks that nobody holds."""

import re
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
    text = rwlock.read_text(errors="replace") if rwlock.exists() else ""
    owners = {int(number) for number in re.findall(r'"pid":\s*(\d+)', text)}
    if owners.isdisjoint(process.pid for process in _workers()):  # damaged, it names none: DVC makes it anew
        rwlock.unlink(missing_ok=True)
        if owners:
            print(f"removed {rwlock}: its processes have ended", flush=True)


def at_work(folder: Path) -> list[psutil.Process]:
    """DVC, stages and trainings that run in a folder."""
    return [process for process in _workers() if process.info["cwd"] == str(folder.resolve())]


def _workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline", "cwd"]) if _is_worker(process.info["cmdline"] or [])]


def _is_worker(words: list[str]) -> bool:
    names = [Path(word).name for word in words[:5]]
    return bool(names) and names[0].startswith("python") and not WORKERS.isdisjoint(names)
