"""Rooms of the library import only downwards, its modules not in circles."""

import ast
from graphlib import TopologicalSorter

import pytest
from shared import ROOT

BASE = {"bounds", "config", "params", "params_file", "variants", "processes"}
ABOVE = "architectures released deepnets hypernetwork measuring training reporting experiments"
LEVELS = [BASE, {"graphs", "data"}, *({room} for room in ABOVE.split())]
ALLOWED = {room: {room}.union(*LEVELS[:i]) for i, level in enumerate(LEVELS) for room in level}
ALLOWED |= dict.fromkeys(BASE, BASE) | {
    "graphs": {"graphs"},
    "bounds": set(),
    "config": {"bounds"},
    "data": {"data", "params"},
}
ALLOWED |= {"reporting": {"reporting"}, "pipeline": BASE | {"reporting", "pipeline"}}
FREE, LATE = {"__init__", "__main__"}, {"ghnlib.__init__", "ghnlib.graphs.graph"}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.glob("ghnlib/**/*.py"))}


def imported(tree):
    """Modules of the library that are imported anywhere within a piece of code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in FILES else node.module for name in names if name.split(".")[0] == "ghnlib"}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ghnlib")


@pytest.mark.parametrize("module", FILES)
def test_modules_import_downwards_and_at_their_head(module):
    tree, room = ast.parse(FILES[module].read_text()), module.split(".")[1]
    rooms = {f"{name}.".split(".")[1] for name in imported(tree)}
    assert room in FREE or rooms <= ALLOWED[room]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert module in LATE or not [name for function in functions for name in imported(function)]


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({module: set(imported(ast.parse(path.read_text()))) for module, path in FILES.items()}).prepare()
