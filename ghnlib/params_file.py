"""Reading params.yaml: one clear error for whatever it may not hold, overlays (profiles)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ghnlib.params import Params, VanillaVariant, Variant


class ParamsError(Exception):
    """Parameters that cannot be used; the message names key, value and what is allowed."""


def validate(raw: Any, where: str = "params.yaml") -> Params:
    """Typed parameters of parsed YAML, or one ``ParamsError`` that lists everything wrong with it."""
    try:
        return Params.of(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{where}: {_describe(e)}" for e in error.errors())) from None


def _describe(error: Mapping[str, Any]) -> str:
    *section, last = path = [str(part) for part in error["loc"] if part != "[key]"] or [""]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        allowed = _keys_of(section)
        near = difflib.get_close_matches(last, allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key} (value {error['input']!r}): {hint}allowed here: {', '.join(allowed)}"
    if error["type"] == "impossible":
        return f"{key}.{error['msg']}".lstrip(".")
    if error["type"] == "missing":
        return f"{key}: this key is missing"
    return f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys_of(section: list[str]) -> list[str]:
    if section[1:2] == ["variants"]:
        return list((Variant if section[0] == "train" else VanillaVariant).model_fields)
    model = Params
    for part in section:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def read_merged(path: str | Path, overlay: str | Path) -> dict[str, Any]:
    """A file with an overlay (``profiles/NAME.yaml``) merged over it, not yet validated.

    An overlay that ``extends`` another, by name, is merged over that one.
    """
    own = read_yaml(overlay)
    below = own.pop("extends", None)
    base = Path(overlay).with_name(f"{below}.yaml")
    if below and (base == Path(overlay) or not base.exists()):
        raise ParamsError(f"{overlay}: extends = {below!r}: there is no such other profile beside it")
    return merge(read_merged(path, base) if below else read_yaml(path), own)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML 1.2 mapping, as DVC reads it (1e-3 is a number)."""
    try:
        values = YAML(typ="safe", pure=True).load(Path(path))
    except YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} holds {values!r}: must be a mapping of keys to values")
    return values


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``overlay``, mappings merged key by key."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = merge(base[key], value) if both else value
    return merged
