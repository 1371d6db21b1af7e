"""Peak resident memory of this process, as Linux counts it."""

from pathlib import Path


def forget_peak() -> None:
    """Count the peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
