"""Reading params.yaml: one clear error for whatever it may not hold, overlays (profiles)."""

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node

from ghnlib.params import Data, Params, Target, VanillaVariant
from ghnlib.variants import Section, TrainVariant

LARGEST, MOST_VALUES = 1 << 18, 20_000
"""Bytes of a file and values in it, many times those of params.yaml: more is a mistake, or would fill the memory."""
NO_TENSORBOARD = "it is not installed here: pip install ghnlib[tensorboard], or set csv"
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}
DIGITS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
"""Embedded images of each digit."""


KINDS = re.compile(r"\[key\]|constrained-(int|float|str)|literal\[.*")
"""What pydantic adds to the path of a value that is of one of several kinds."""


class ParamsError(Exception):
    """Parameters that cannot be used; the message names key, value and what is allowed."""


def validate(raw: Any, where: str = "params.yaml") -> Params:
    """Typed parameters of parsed YAML, or one ``ParamsError`` that lists everything wrong with it."""
    try:
        params = Params.of(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{where}: {_describe(e)}" for e in error.errors())) from None
    if impossible := list(_impossible(params)):
        raise ParamsError("\n".join(f"{where}: {text}" for text in impossible))
    return params


def _describe(error: Mapping[str, Any]) -> str:
    *section, last = path = [part for part in map(str, error["loc"]) if not KINDS.fullmatch(part)] or [""]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        allowed = _keys_of(section)
        near = difflib.get_close_matches(last, allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown key {key} (value {_short(error['input'])}): {hint}allowed here: {', '.join(allowed)}"
    if error["type"] == "impossible":
        return f"{key}.{error['msg']}".lstrip(".")
    if error["type"] == "missing":
        return f"{key}: this key is missing"
    return f"{key} = {_short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _keys_of(section: list[str]) -> list[str]:
    if section[1:2] == ["variants"]:
        return list((TrainVariant if section[0] == "train" else VanillaVariant).model_fields)
    model: Any = Params
    for part in section:
        own = model.model_fields.get(part)
        # what is not a key of its own is one of a mapping's, or the place of "null or a section"
        model = next(iter(_sections_in(own.annotation)), model) if own else model
    return list(model.model_fields)


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _impossible(params: Params) -> Iterator[str]:
    """What each value allows and all together do not: it is said before a stage has run for hours."""
    for key, value, limit, why in _limits(params):
        if value > limit:
            yield f"{key} = {value}: at most {limit}, {why}"
    if params.train.logger == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        yield f"train.logger = 'tensorboard': {NO_TENSORBOARD}"
    for section, networks in (("train", params.deepnets.extra), ("anytime", ())):
        for name in getattr(params, section).variants:
            if (share := getattr(params, section).recipe_of(name).extra_share) and not networks:
                text = "must be 0, deepnets.extra names no networks" if section == "train" else "must be 0"
                yield f"{section}.variants.{name}: extra_share = {share}: {text}"
    for key, section in _images_of(params):
        if section.source != "digits" and section.root is None:
            yield f"{key}.root = None: the source {section.source} needs the folder of its images"
        if section.source == "digits" and (section.image_size or 0) > 256:
            yield f"{key}.image_size = {section.image_size}: at most 256, the embedded digits have 8 pixels a side"


HUB_ID = re.compile(r"(?!models/|runs/|\.)[\w.-]+(/[\w.-]+)?")


def is_path(source: str, root: Path = Path()) -> bool:
    """Whether a hypernetwork's source is a file or folder, there or missing: not a released name or hub id."""
    return (root / source).exists() or not HUB_ID.fullmatch(source)


def check_starts(params: Params, trainings: Iterable[str]) -> None:
    """Raise ParamsError if files are missing that some of the trainings start from, or made by others of this run: no
    stage would wait for those."""
    own = {Path("models", name).resolve() for name in params.train.trainings}
    for variant, seed in (params.train.trainings[name] for name in trainings):
        start = params.train.start_of(variant, seed)
        if not (start and is_path(start)):
            continue
        key, path = f"train.variants.{variant}.start_from = {_short(start)}", Path(start).resolve()
        if not own.isdisjoint((path, *path.parents)):
            raise ParamsError(f"{key}: this run trains it itself. Start from it in a profile, which has a run of its "
                              "own (as profiles/fashion.yaml does), or give another file or hub id")  # fmt: skip
        if not path.exists():
            raise ParamsError(f"{key}: there is no such file or folder (for the seed {seed}). Train that hypernetwork "
                              "first, or give another file or hub id")  # fmt: skip


def _images_of(params: Params) -> Iterator[tuple[str, Data | Target]]:
    yield "data", params.data
    yield from ((f"transfer.targets.{name}", target) for name, target in params.transfer.targets.items())
    seconds = {"analysis.second": params.analysis.second, "anytime.search.second": params.anytime.search.second}
    yield from ((key, section) for key, section in seconds.items() if section)


def _limits(params: Params) -> Iterator[tuple[str, float, float, str]]:
    """Key, value, its largest possible value, and why it is that."""
    pools = (("train", "deepnets.train_pool", params.deepnets.train_pool),
             ("anytime", "anytime.train_networks", params.anytime.train_networks))  # fmt: skip
    for section, key, pool in pools:
        for name in getattr(params, section).variants:
            recipe, own = getattr(params, section).recipe_of(name), f"{section}.variants.{name}: "
            used = recipe.architectures or pool
            yield f"{own}architectures", used, pool, f"there are so many to train on ({key})"
            yield f"{own}meta_batch", recipe.meta_batch, used, "so many architectures are trained on"
    most = max(params.train.recipe_of(name).meta_batch for name in params.train.variants)
    yield "train.devices", params.train.devices, most, "they share a meta-batch, of at most so many networks"
    transfer, detection = params.transfer, params.transfer.detection
    indices = [index for index in detection.backbones if isinstance(index, int)]
    last = params.deepnets.test - 1
    yield "transfer.detection.backbones", max(indices, default=0), last, "the index of the last test architecture"
    scenes = detection.train_scenes * 3 // 4 if len(detection.lrs) > 1 else detection.train_scenes
    yield "transfer.detection.batch_size", detection.batch_size, scenes, "there are no more scenes (for tuning 3 of 4)"
    if classes := CLASSES.get(params.data.source):
        most, left = (classes, "") if transfer.targets else (classes - 1, ", and one is to be left to transfer to")
        yield "transfer.source_classes", transfer.source_classes, most, f"there are {classes} classes{left}"
    if params.data.source == "digits":
        yield from _limits_of_digits(params)


def _limits_of_digits(params: Params) -> Iterator[tuple[str, float, float, str]]:
    val, test = params.data.val_share * (1 - params.data.test_share), params.data.test_share
    tested = [max(1, round(test * count)) for count in DIGITS]
    trained = [count - own - max(1, round(val * count)) for count, own in zip(DIGITS, tested)]
    if min(trained) < 2:
        why = "two images of each digit are to be left to train on"
        yield "data: val_share + test_share * (1 - val_share)", round(val + test, 3), 0.98, why
        return
    yield "data.test_per_class", params.data.test_per_class or 1, min(tested), "as data.test_share leaves"
    if not params.transfer.targets:
        yield "transfer.per_class", params.transfer.per_class, min(trained), "training images of the rarest digit"
    epoch, why = sum(trained), "training images of an epoch"
    yield "evaluate.sgd.batch_size", params.evaluate.sgd.batch_size, epoch, why
    yield "finetune.batch_size", params.finetune.batch_size, epoch, why


def read_merged(path: str | Path, overlay: str | Path) -> dict[str, Any]:
    """A file with an overlay (``profiles/NAME.yaml``) merged over it, not yet validated.

    An overlay that ``extends`` another, by name, is merged over that one.
    A variant that is null in the overlay is left out.
    """
    merged = _merged(path, overlay, ())
    for section in "train", "anytime":
        within = merged.get(section)
        if isinstance(within, dict) and isinstance(within.get("variants"), dict):
            merged[section] = within | {"variants": {k: v for k, v in within["variants"].items() if v is not None}}
    return merged


def _merged(path: str | Path, overlay: str | Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """``above``: overlays that extend this one."""
    own = read_yaml(overlay)
    below = own.pop("extends", None)
    if below is None:
        return merge(read_yaml(path), own)
    others = {other.stem: other for other in Path(overlay).parent.glob("*.yaml")}
    above = (*above, Path(overlay))
    if not isinstance(below, str) or others.get(below) in (None, *above):
        raise ParamsError(f"{overlay}: extends = {below!r}: there is no such other profile beside it")
    return merge(_merged(path, others[below], above), own)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML 1.2 mapping, as DVC reads it (1e-3 is a number), of text, numbers, truth values, nulls. Raises ParamsError
    for any other file."""
    try:
        values = _load(Path(path).read_bytes())
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # besides its own errors ruamel.yaml lets those of Python through, of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ParamsError(f"{path} is not valid YAML: {reason[:300]}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} holds {_short(values)}: must be a mapping of keys to values")
    if unusual := list(_unusual(values)):
        raise ParamsError("\n".join(f"{path}: {text}" for text in unusual))
    return values


def _load(text: bytes) -> Any:
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text)} bytes, at most {LARGEST} are read")
    yaml = YAML(typ="safe", pure=True)
    node = yaml.compose(text)
    if node is None:
        return None
    if (count := _count(node, {})) > MOST_VALUES:
        raise ValueError(f"it holds {count} values, aliases (*name) as what they stand for; at most {MOST_VALUES}")
    return yaml.constructor.construct_document(node)


def _count(node: Node, counts: dict[Node, float]) -> float:
    """Values in a node of the parsed file, each alias counted as what it stands for: a few bytes may mean billions.
    Infinite if one stands for what it is in."""
    if node not in counts:
        counts[node] = inf
        parts = chain(*node.value) if isinstance(node, MappingNode) else node.value
        counts[node] = 1 + sum(_count(part, counts) for part in parts if not isinstance(part, str))
    return counts[node]


def _unusual(value: Any, key: str = "") -> Iterator[str]:
    """What YAML can say and params.yaml does not: dates, sets, bytes; numbers as keys."""
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield from _unusual(item, f"{key}.{name}".lstrip("."))
            else:
                yield f"the key {_short(name)} in {key or 'the file'} is no text: put it in quotes"
    elif isinstance(value, list):
        for item in value:
            yield from _unusual(item, key)
    elif not isinstance(value, str | bool | int | float | None):
        yield f"{key} = {_short(value)} is neither text nor number: put it in quotes"


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``overlay``, mappings merged key by key."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = merge(base[key], value) if both else value
    return merged
