"""What a reader sees while the pipeline runs: a line when a stage has ended, and now and then how far a long one is."""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from statistics import mean

OF_DVC = re.compile(
    r"Running stage|> |\s*$|Updating lock file|Generating lock file|Use `dvc push`|Stage '.*' didn't change|"
    r"Data and pipelines are up to date|To track the changes|To enable auto staging|\s+(git add|dvc config)"
)
"""Lines that DVC writes for those who work on the pipeline. Its errors and warnings are others."""
COUNTED = re.compile(r"(?<!\S)(\d+)/(\d+)(?!\S)")
EVERY = 30
"""Seconds between two lines on how far a stage is."""


class Progress:
    """Lines about stages that run side by side; safe to be called from several threads.

    Args:
        stages: all that are to run.
        expected: seconds that stages took in an earlier run, those that are known.
        side_by_side: stages that run at a time.
    """

    def __init__(self, stages: Sequence[str], expected: Mapping[str, float], side_by_side: int):
        self.stages, self.expected, self.side_by_side = stages, expected, side_by_side
        self.lock, self.begun, self.started, self.taken = threading.Lock(), time.monotonic(), {}, {}
        self.counts: dict[str, tuple[int, int, float]] = {}  # total, first count and its time, of what a stage counts
        self.told: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """Note that a stage runs from now on."""
        self.started[stage] = time.monotonic()

    def read(self, stage: str, line: str) -> None:
        """Pass on a line of a stage's output: not DVC's, and of counts ("step 300/3000") one in half a minute, with
        their rate and the time that they have left."""
        if OF_DVC.match(line):
            return
        if count := COUNTED.search(line):
            now, done, total = time.monotonic(), int(count[1]), int(count[2])
            known, first, since = self.counts.get(stage, (0, 0, 0.0))
            if known != total or done < first:
                self.counts[stage] = known, first, since = total, done, now
            if now - self.told.get(stage, self.started.get(stage, now)) < EVERY:
                return
            self.told[stage] = now
            if done > first and "it" not in line.rpartition("[")[2]:  # bars tell their own rate
                rate = (done - first) / (now - since)
                line = f"{line}  {rate:.3g} a second, {in_words((total - done) / rate)} left"
        self._say(f"{stage}: {line}")

    def end(self, stage: str, ran: bool = True) -> None:
        """Tell that a stage has ended; not ``ran``: it was up to date."""
        now = time.monotonic()
        with self.lock:
            self.taken[stage] = now - self.started.get(stage, now)
        left = self.seconds_left()
        done = f"{sum(name in self.taken for name in self.stages)} of {len(self.stages)} stages"
        how = f"done in {in_words(self.taken[stage])}" if ran else "up to date"
        self._say(f"{stage}: {how}; {done}" + (f", about {in_words(left)} left" if left >= 1 else ""))

    def seconds_left(self) -> float:
        """Of all stages: what each took in an earlier run, or those of its kind (train), or all that have ended."""
        with self.lock:
            known, now = {**self.expected, **self.taken}, time.monotonic()
            left = [max(0.0, self._likely(stage, known) - (now - self.started.get(stage, now)))
                    for stage in self.stages if stage not in self.taken]  # fmt: skip
        return max([sum(left) / self.side_by_side, *left])

    def _likely(self, stage: str, known: Mapping[str, float]) -> float:
        kind = stage.partition("@")[0]
        alike = [seconds for name, seconds in known.items() if name.partition("@")[0] == kind]
        return known.get(stage, mean(alike or known.values() or [0.0]))

    def _say(self, text: str) -> None:
        print(f"{in_words(time.monotonic() - self.begun):>7} | {text}", flush=True)


def in_words(seconds: float) -> str:
    """A duration: "12 s", "3:05", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
