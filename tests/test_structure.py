"""Rooms of the library import only downwards, and its modules not in circles."""

import ast
from graphlib import TopologicalSorter

import pytest
from shared import ROOT

BASE = {"config", "params", "params_file", "processes"}
ABOVE = "architectures released deepnets hypernetwork measuring training reporting experiments"
LEVELS = [BASE, {"graphs", "data"}, *({room} for room in ABOVE.split())]
ALLOWED = {room: set().union(*LEVELS[:i], {room}) for i, level in enumerate(LEVELS) for room in level}
ALLOWED |= dict.fromkeys(BASE, BASE) | {"reporting": {"reporting"}, "pipeline": BASE | {"reporting", "pipeline"}}
FREE, LATE = {"__init__", "__main__"}, {"ghnlib/__init__.py", "ghnlib/graphs/graph.py"}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.glob("ghnlib/**/*.py"))}


def imports(module):
    """Modules of the library that a module imports -> whether within a function."""
    tree, found = ast.parse(FILES[module].read_text()), {}
    late = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [name if (name := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.split(".")[0] == "ghnlib":
                found[name] = found.get(name, False) or id(node) in late
    return found


@pytest.mark.parametrize("module", FILES)
def test_modules_import_downwards_and_at_their_head(module):
    room = module.split(".")[1]
    for name, late in imports(module).items():
        assert room in FREE or name.split(".")[1:2] and name.split(".")[1] in ALLOWED[room], f"{module} imports {name}"
        assert not late or str(FILES[module].relative_to(ROOT)) in LATE, f"{module} imports {name} in a function"


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({m: {n for n, late in imports(m).items() if not late} for m in FILES}).prepare()
