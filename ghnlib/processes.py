"""Processes that end together: what a killed run leaves behind must not go on training."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil


def stop_with(pid: int) -> None:
    """Ask this process to stop (SIGTERM) when another one has ended, however that happened; watched from a thread.

    A process that has not stopped ten seconds later is killed: it may wait for one that will never answer.
    """
    threading.Thread(target=_watch, args=(pid,), daemon=True).start()


def _watch(pid: int) -> None:
    while psutil.pid_exists(pid):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os.kill(os.getpid(), signal.SIGKILL)
