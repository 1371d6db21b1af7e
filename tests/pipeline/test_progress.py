"""What is told of a run: no more than serves, with what is left."""

import time

import pytest

from ghnlib.pipeline.progress import Progress, in_words


class Run:
    """Progress of four stages, two at a time, the lines that it says, and seconds that a test sets."""

    def __init__(self, expected, monkeypatch, capsys):
        self.capsys, self.now = capsys, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.progress = Progress(["sources", "train@a", "train@b", "claims"], expected, 2)

    def at(self, seconds):
        self.now = float(seconds)
        return self.progress

    def told(self):
        return self.capsys.readouterr().out.splitlines()


@pytest.fixture
def run(monkeypatch, capsys):
    """By the seconds expected."""
    return lambda expected: Run(expected, monkeypatch, capsys)


def test_the_rest_is_what_stages_took_before(run):
    run = run({"sources": 10.0, "train@a": 100.0, "train@b": 60.0, "claims": 20.0})
    assert run.progress.seconds_left() == 100, "the longest alone takes as long"
    run.progress.begin("sources")
    run.at(12).end("sources")
    assert run.told() == ["   12 s | sources: done in 12 s; 1 of 4 stages, about 1:40 left"]
    run.progress.begin("train@a")
    assert run.at(72).seconds_left() == pytest.approx(60), "of train@a 40, of train@b 60, of claims 20, two at a time"


def test_without_an_earlier_run_the_rest_is_like_what_has_ended_and_first_its_kind(run):
    run = run({})
    assert run.progress.seconds_left() == 0
    run.progress.begin("sources")
    run.at(4).end("sources")
    run.progress.begin("train@a")
    run.at(104).end("train@a")
    assert run.progress.seconds_left() == pytest.approx(100), "train@b as train@a, claims as the mean of 4 and 100"
    run.at(105).end("train@b", ran=False)
    assert run.told()[-1].startswith("   1:45 | train@b: up to date; 3 of 4 stages")
    run.at(106).end("claims", ran=False)
    assert run.told()[-1] == "   1:46 | claims: up to date; 4 of 4 stages"


def test_lines_for_those_who_work_on_the_pipeline_are_left_out(run):
    run = run({})
    for line in ("Running stage 'a':", "> python -m x", "", "Updating lock file 'dvc.lock'", "Use `dvc push` to send",
                 "Stage 'a' didn't change, skipping", "ERROR: failed", "0 networks diverged"):  # fmt: skip
        run.progress.read("a", line)
    assert run.told() == ["    0 s | a: ERROR: failed", "    0 s | a: 0 networks diverged"]


def test_counts_are_told_now_and_then_with_rate_and_rest(run):
    run = run({})
    run.progress.begin("train@a")
    for second in range(0, 70, 10):
        run.at(second).read("train@a", f"step  {20 * second}/2000  loss 1.5")
    assert run.told() == [
        "   30 s | train@a: step  600/2000  loss 1.5  20 a second, 1:10 left",
        "   1:00 | train@a: step  1200/2000  loss 1.5  20 a second, 40 s left",
    ]
    run.at(100).read("train@a", "run:  12%|#  | 12/100 [00:30<03:40,  2.5s/it]")
    assert run.told()[-1].endswith("2.5s/it]")


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05"), (3723, "1:02:03")])
def test_durations(seconds, words):
    assert in_words(seconds) == words
