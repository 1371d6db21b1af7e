"""What ``dvc exp run -S`` writes to params.yaml stays there when it is refused; here it is taken back."""

import copy
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ghnlib.params_file import ParamsError, read_yaml, validate
from ghnlib.pipeline.notebooks import write_text


def take_back() -> str:
    """Undo what ``dvc exp run -S`` has written to params.yaml before any stage ran: of the differences from the
    committed file those that are refused. Returns what is to be said of it."""
    committed = subprocess.run(["git", "show", "HEAD:./params.yaml"], capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "params.yaml").write_bytes(committed.stdout)
        try:
            validate(before := read_yaml(Path(folder, "params.yaml")))
        except ParamsError:  # no repository, or no file that could be restored
            return ""
    by_hand = "\nThe committed file is valid: git checkout HEAD -- params.yaml"
    try:
        now = read_yaml("params.yaml")
    except ParamsError:
        return by_hand
    if not _faults(now):
        return ""
    undone, differences = [], list(_differences(before, now))
    for path in differences:
        _restore(other := copy.deepcopy(now), before, path)
        if _faults(other) < _faults(now):
            now, undone = other, [*undone, path]
    if _faults(now):
        return by_hand
    if undone == differences:
        write_text(committed.stdout.decode(), Path("params.yaml"))
        return "\nparams.yaml is as before"
    from dvc.utils.serialize import modify_yaml  # keeps comments; half a second to import

    with modify_yaml("params.yaml") as values:
        for path in undone:
            _restore(values, before, path)
    return f"\nparams.yaml has the committed {', '.join(map('.'.join, undone))} again; other changes stay"


def _differences(before: Mapping, now: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of what was changed, added or removed."""
    for key in {**before, **now}:
        one, other = before.get(key, _differences), now.get(key, _differences)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, (*path, key))
        elif repr(one) != repr(other):  # True is not 1
            yield (*path, key)


def _restore(values: Any, before: Any, path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        values, before = values[key], before[key]
    if path[-1] in before:
        values[path[-1]] = before[path[-1]]
    else:
        del values[path[-1]]


def _faults(values: Mapping) -> int:
    try:
        validate(values)
        return 0
    except ParamsError as error:
        return len(str(error).splitlines())
