"""Notebooks as plain, comparable files: sources without outputs, executed ones without traces of when and where."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


NOTEBOOKS = {
    "architectures": "1_architectures",
    "train": "2_train",
    "evaluate": "3_evaluate",
    "finetune": "4_finetune",
    "transfer": "5_transfer",
    "analysis": "6_analysis",
    "anytime": "7_anytime",
    "claims": "8_claims",
}
"""Notebook of each stage, in their order."""


class NotebookError(Exception):
    """A notebook that the pipeline cannot run; the message says why."""


def label(stage: str, training: str = "") -> str:
    """Name of a stage's metrics: "evaluate", "train-ghn3-0"."""
    return f"{stage}-{training}" if training else stage


def read(path: Path) -> NotebookNode:
    """A notebook file, in the current format. Raises NotebookError if it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"{path} does not exist.") from None
    except (ValueError, KeyError) as error:
        raise NotebookError(f"{path} is not a notebook: {error}") from None


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook; a crash or a full disk leaves the earlier file."""
    write_text(nbformat.writes(notebook) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write next to the file, then replace it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def clean(notebook: NotebookNode) -> NotebookNode:
    """What an author wrote, without what running it or opening it in Jupyter changes."""
    return _tidied(notebook, lambda cell: {"outputs": [], "execution_count": None})


def normalise(notebook: NotebookNode, root: Path) -> NotebookNode:
    """An executed notebook such that equal runs give equal bytes: no times, random ids, addresses or folders."""
    styles: dict[str, str] = {}
    return _tidied(notebook, lambda cell: {"outputs": _scrubbed(_without_noise(cell.outputs), str(root), styles)})


def _tidied(notebook: NotebookNode, changes: Callable[[NotebookNode], dict]) -> NotebookNode:
    """With numbered cells, little metadata, and the changes of each code cell."""
    cells = []
    for i, cell in enumerate(notebook.cells):
        kept = {key: cell.metadata[key] for key in ("jupyter", "tags") if cell.metadata.get(key)}
        code = changes(cell) if cell.cell_type == "code" else {}
        cells.append({**cell, **code, "id": f"cell-{i:02d}", "metadata": kept})
    return nbformat.from_dict({"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5})


def _without_noise(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Without stderr (progress bars, warnings with paths) and widgets, each run of prints as one piece of text."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        # How prints are cut into messages depends on timing.
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1] = NotebookNode({**kept[-1], "text": kept[-1].text + output.text})
        else:
            kept.append(NotebookNode({**output, "metadata": {}} if "metadata" in output else output))
    return kept


def _scrubbed(value: Any, root: str, styles: dict[str, str]) -> Any:
    """Without what differs between equal runs. ``styles``: random names that pandas gives styled tables -> ours."""
    if isinstance(value, list):
        return [_scrubbed(item, root, styles) for item in value]
    if isinstance(value, dict):
        # Images are base64 text: nothing to replace, and chance would find matches.
        kept = {k: v if k.startswith("image/png") else _scrubbed(v, root, styles) for k, v in value.items()}
        return NotebookNode(kept)
    if not isinstance(value, str):
        return value
    text = re.sub(r"[^\n]*\r(?!\n)", "", value)  # overwritten lines
    text = re.sub(r"\bat 0x[0-9a-fA-F]+", "at 0x...", text).replace(root, ".")
    name = lambda match: styles.setdefault(match[0], f"T_{len(styles):05d}")
    return re.sub(r"\bT_[0-9a-f]{5}(?=_|\b)", name, text)
