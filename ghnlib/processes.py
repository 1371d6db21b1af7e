"""Processes that end together, and in good order: what a killed run leaves behind must not go on training."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import filelock
import psutil

PATIENCE = 600
"""Seconds: longer than a step, the validation of large networks and a checkpoint of gigabytes take together."""


@contextmanager
def termination_noted() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM ends nothing: yields whether it has come, for work that can stop between two steps.

    Signals reach the main thread alone: in another one nothing changes.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def sole_holder(
    path: Path, holder: str, patience: float, say: Callable[[str], object]
) -> AbstractContextManager[filelock.BaseFileLock]:
    """A lock, held until the context ends. Another process that holds it, the ``holder``, may be about to end: it is
    given so many seconds. Raises filelock.Timeout if it goes on."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"{holder} still runs: waiting {patience} seconds, in case it is about to end")
    return lock.acquire(timeout=patience)


def stop_with(pid: int) -> None:
    """Ask this process to stop (SIGTERM) when another one has ended, however that happened; watched from a thread.

    A process that has not stopped ``PATIENCE`` later is killed: it may wait for one that will never answer.
    """
    threading.Thread(target=_watch, args=(pid,), daemon=True).start()


def _watch(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
