"""Calls whose results are kept: interrupted, failing, repeated."""

import pandas as pd
import pytest
import torch
from shared import tiny

from ghnlib.measuring.kept import map_kept, rows_kept


def scored(name, log):
    with log.open("a") as file:
        file.write(name)
    if name == "c":
        raise NotImplementedError("no such layer:\n  Fold")
    if name == "d" and log.with_name("interrupt").exists():
        raise KeyboardInterrupt
    return [{"step": step, "score": step / 3} for step in (0, 1)] if name == "e" else {"step": 0, "score": 0.1 + 0.2}


def test_a_table_names_failures_and_goes_on_where_it_stopped(tmp_path):
    log, interrupt = tmp_path / "log", tmp_path / "interrupt"

    def table():
        tasks = [({"network": name}, (name,)) for name in "abcde"]
        return rows_kept(scored, tasks, (log,), folder=tmp_path / "deep" / "kept")

    interrupt.touch()
    with pytest.raises(KeyboardInterrupt):
        table()
    interrupt.unlink()
    whole = table()
    assert log.read_text() == "abcd" + "cde"  # what failed is tried again
    assert list(whole["network"]) == [*"abcdee"]
    assert list(whole["error"]) == ["", "", "NotImplementedError: no such layer: Fold", "", "", ""]
    assert whole["score"][1] == 0.1 + 0.2 and pd.isna(whole["score"][2]) and whole["score"][5] == 1 / 3
    pd.testing.assert_frame_equal(table(), whole)
    assert log.read_text() == "abcdcde" + "c"


def summed(factor, ghn, log):
    with log.open("a") as file:
        file.write("x")
    return factor * float(sum(p.detach().sum() for p in ghn.parameters()))


def test_results_belong_to_the_values_of_what_they_are_of(tmp_path):
    ghn, log = tiny(), tmp_path / "log"

    def results():
        return map_kept(summed, [(1.0,), (2.0,)], (ghn, log), folder=tmp_path / "kept")

    first = results()
    assert results() == first and log.read_text() == "xx"
    with torch.no_grad():
        next(ghn.parameters()).add_(1)
    assert results() != first and log.read_text() == "xxxx"


def test_without_a_folder_nothing_is_kept(tmp_path):
    log = tmp_path / "log"
    for _ in range(2):
        map_kept(summed, [(1.0,)], (tiny(), log))
    assert log.read_text() == "xx"
