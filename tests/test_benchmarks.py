"""Benchmarks, which nothing else runs, still find what they import."""

import runpy

import pytest
from shared import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_be_imported(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    assert runpy.run_path(str(path))["__doc__"]


def test_rows_of_ppuda_table_13_are_timed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed.py", "--data", "cifar10", "--steps", "1", "--batch-size", "2"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed = runpy.run_path(str(ROOT / "benchmarks" / "speed.py"))
    speed["ROWS"][:] = [("mlp", 1)]
    speed["main"]()
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("cifar10: 2 images of 32 pixels")
    assert [line.split("  ")[0] for line in told[1:]] == ["ResNet-50, SGD", "mlp, m = 1"]
    for line in told[1:]:
        taken, hours = float(line.split(" s a step")[0].split()[-1]), float(line.split(" h an epoch")[0].split()[-1])
        assert hours == pytest.approx(taken * 22_500 / 3600, abs=0.1) and "paper 0." in line
