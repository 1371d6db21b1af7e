"""Benchmarks, which nothing else runs, still find what they import."""

import re
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


def test_a_step_is_timed_beside_its_networks(monkeypatch, capsys):
    monkeypatch.setattr("torch.multiprocessing.spawn", lambda function, given, nprocs: function(0, *given))
    options = "--meta-batch 1 --batch-size 2 --image-size 16 --steps 1 --processes 1 --hypernetworks ghn2"
    monkeypatch.setattr("sys.argv", ["training.py", *options.split()])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / "training.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert len(re.findall(r"ghn2 +(?:float32|bfloat16) +floor +[\d.]+ s  step +[\d.]+ s  ratio +[\d.]+\n", told)) == 2
    for line in re.findall(r"encoder .*", told):
        assert sum(map(float, re.findall(r"([\d.]+)%", line))) == pytest.approx(100, abs=0.3)


def test_a_recipe_is_tried_with_networks_of_ones_own_too(monkeypatch, tmp_path):
    changes = ["train.variants.ghn3.extra_share=0.4", "train.recipe.steps=2", "deepnets.train_pool=4", "deepnets.val=1"]
    monkeypatch.setattr("sys.argv", ["recipes.py", "ghn3", "0", *changes])
    monkeypatch.chdir(ROOT)
    recipes = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
    recipes["main"].__globals__["RESULTS"] = tmp_path / "recipes.csv"
    recipes["main"]()
    rows = (tmp_path / "recipes.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith("ghn3,train.variants.ghn3.extra_share=0.4 train.recipe.steps=2 ")


def test_the_parts_for_a_gpu_run_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--tiny", "--steps", "1"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    told = capsys.readouterr().out
    parts = re.split(r"^--- (\w+): .*\n", told, flags=re.M)[1:]
    parity, speed, predict, evaluate, resume = parts[1::2]
    assert parts[::2] == ["parity", "speed", "predict", "evaluate", "resume"]
    assert parity.count("error of a gradient 0.0e+00") == 4 and "TOO LARGE" not in parity
    assert speed.count("steps a second") == speed.count("1 wait (limit 1)") == 8
    assert re.search(r"cifar10 ghn2 m = 1: .* paper 1.16", speed) and speed.count("memory: about") == 8
    assert re.search(r"ghn3-t resnet18: [\d.]+ ms \(read and write once at \d+ GB/s: [\d.]+\)", predict)
    assert "evaluation of 128 images" in evaluate
    assert resume.endswith("relative error 0.0e+00 (CPU: 0; GPUs add up in any order)\n")
