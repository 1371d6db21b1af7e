"""Every experiment on a device that refuses what a GPU refuses, see ``on_device.py`` and ``device.py``."""

import subprocess
import sys
from pathlib import Path


def test_every_experiment_finds_there_what_it_finds_on_the_cpu():
    """In a process of their own: where torch knows a device, autograd refuses to run in forked processes, as other
    tests need it."""
    checks = Path(__file__).with_name("on_device.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(checks)], cwd=checks.parents[1],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
