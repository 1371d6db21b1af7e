"""Hypernetwork files, our own and official ones of PPUDA and GHN-3, read without running what they contain."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor

from ghnlib.config import MOST_PRIMITIVES, GHNConfig
from ghnlib.released.errors import one_line
from ghnlib.released.unpickling import read_pickle

HUB_REPOSITORY = "SamsungSAILMontreal/ghn3"
RELEASED = ("ghn3tm8.pt", "ghn3sm8.pt", "ghn3lm8.pt", "ghn3xlm16.pt", "ghn2.pt")
PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""Hypernetworks that come with the package, a folder each; its name loads it."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""What ``save_pretrained`` writes."""
MAX_TENSORS, MAX_HEADER = 10_000, 2 * 2**20
"""Tensors of a file, and bytes that describe them or the configuration; GHN-3-XL has 291 tensors in 28,000 bytes."""
OTHERS = {
    b"version https://git-lfs": "it is a pointer of Git LFS: run git lfs pull",
    b"<!doctype html": "it is a web page: download the file itself",
    b"<html": "it is a web page: download the file itself",
}
"""What is there instead of a file, by its first bytes."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Official tensor name -> ours. Released GHN-3 files keep the three node tables at top level, later ones in gnn.0.
_NAMES = [
    (r"^ln\.", "norm."),
    (r"^embed\.", "embedding.op."),
    (r"^shape_enc\.embed_(channel|spatial)\.", r"embedding.\1."),
    (r"^(gnn\.0\.)?centrality_embed_in\.", "encoder.in_degree."),
    (r"^(gnn\.0\.)?centrality_embed_out\.", "encoder.out_degree."),
    (r"^(gnn\.0\.)?input_dist_embed\.", "encoder.input_distance."),
    (r"^gnn\.0\.attn\.edge_embed\.embed\.", "encoder.edge."),
    (r"^gnn\.0\.attn\.proj_e\.", "encoder.edge_bias."),
    (r"^gnn\.(mlp|mlp_ve)\.fc\.", r"encoder.\1."),
    (r"^gnn\.(gru|fc)\b", r"encoder.\1"),
    (r"^gnn\.(\d+)\.ln([12])\.", r"encoder.layers.\1.norm\2."),
    (r"^gnn\.(\d+)\.attn\.to_qkv\.", r"encoder.layers.\1.qkv."),
    (r"^gnn\.(\d+)\.attn\.to_out\.0\.", r"encoder.layers.\1.out."),
    (r"^gnn\.(\d+)\.ff\.net\.0\.", r"encoder.layers.\1.feed_forward.0."),
    (r"^gnn\.(\d+)\.ff\.net\.3\.", r"encoder.layers.\1.feed_forward.2."),
    (r"^decoder\.fc\.0\.", "weight_decoder.fc."),  # with the MLP decoder fc1, see read_checkpoint
    (r"^decoder\.fc\.2\.", "weight_decoder.fc2."),
    (r"^decoder\.conv\.0\.", "weight_decoder.conv1."),
    (r"^decoder\.conv\.2\.", "weight_decoder.conv2."),
    (r"^decoder\.class_layer_predictor\.1\.", "weight_decoder.class_layer."),
    (r"^decoder_1d\.fc\.0\.", "vector_decoder.fc1."),
    (r"^decoder_1d\.fc\.2\.", "vector_decoder.fc2."),
    (r"^bias_class\.1\.", "vector_decoder.class_layer."),
]


class CheckpointError(RuntimeError):
    """A hypernetwork file that is missing, truncated, unsafe or does not fit its configuration."""


def locate(source: str | Path, **hub: Any) -> Path:
    """The file of tensors that a source names.

    Args:
        source: a file, a folder of ``save_pretrained``, the name of a hypernetwork of the package (of a folder of
            ``PRETRAINED``), a released name (``RELEASED``) or a hub repository.
        hub: arguments of ``hf_hub_download``, for what is downloaded.

    Raises:
        CheckpointError: there is no such file, or it could not be downloaded.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in pretrained_names() and not (path / CONFIG).is_file():
        path = PRETRAINED / path
    if path.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{source} is not a hypernetwork folder: there is no {' and no '.join(missing)} in it"
            )
        return path / WEIGHTS
    if str(source) in RELEASED:
        return _download(source, HUB_REPOSITORY, str(source), hub)
    if path.suffix in (".pt", ".pth", ".joblib", ".safetensors"):
        raise CheckpointError(f"{source}: no such file, and not a released name ({', '.join(RELEASED)})")
    _download(source, str(source), CONFIG, hub)
    return _download(source, str(source), WEIGHTS, hub)


def pretrained_names() -> list[str]:
    """Of the hypernetworks that come with the package."""
    return sorted(config.parent.name for config in PRETRAINED.glob(f"*/{CONFIG}"))


def _download(source: str | Path, repository: str, name: str, hub: Mapping[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(repository, name, **hub))
    except HFValidationError as error:
        raise CheckpointError(f"{_nothing_here(source)}, and no hub repository can have this name") from error
    except OSError as error:
        raise CheckpointError(
            f"{_nothing_here(source)}, and could not download {name} from huggingface.co/{repository} "
            f"({type(error).__name__}). Download it elsewhere, put it in {Path.cwd()} and try again, or pass its path"
        ) from error


def _nothing_here(source: str | Path) -> str:
    return f"{source}: no such file or folder, not of the package ({', '.join(pretrained_names())})"


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file holds, or has beside it: of tensors under our own names ``config.json`` must be there.

    Returns:
        Fields of ``GHNConfig``, possible ones, and tensors under the names that ``GHN`` uses.

    Raises:
        CheckpointError: truncated, unsafe or no hypernetwork; the message names the file.
    """
    try:
        state, stated = _contents(read_tensors(path))
        if sum(value.nbytes for value in state.values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        own = "embedding.op.weight" in state
        state = {our_name(name): value for name, value in state.items()}
        if "weight_decoder.fc2.weight" in state:
            state = {name.replace("weight_decoder.fc.", "weight_decoder.fc1."): value for name, value in state.items()}
        # PPUDA keeps the decoder's 1x1 convolutions as such; here they are linear layers.
        state = {name: value.flatten(1) if value.ndim == 4 else value for name, value in state.items()}
        config = _beside(path) if own else _checked(_configuration(state, stated))
    except CheckpointError:
        raise
    except Exception as error:  # damaged and hostile files can raise any
        raise CheckpointError(f"{path} is not a hypernetwork file, or is truncated: {one_line(error)}") from error
    return config, state


def our_name(name: str) -> str:
    """The name in ``GHN.state_dict`` of a tensor of an official file."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_tensors(path: Path) -> Any:
    """What a file of torch, joblib or safetensors holds, if these are tensors and plain values alone.

    Raises:
        Exception: it is something else, truncated, larger than the limits, or wants to run code; of any class.
    """
    with path.open("rb") as file:
        start = file.read(40)
    for words, reason in OTHERS.items():
        if start.strip().lower().startswith(words):
            raise ValueError(reason)
    if not start:
        raise ValueError("it is empty")
    if path.suffix != ".safetensors":
        return read_pickle(path)
    header = int.from_bytes(start[:8], "little")
    if header > MAX_HEADER:
        raise ValueError(f"its header has {header:,} bytes, at most {MAX_HEADER:,} are read")
    return load_file(path)


def _contents(content: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a file by name, without the prefixes of DDP and torch.compile, and the stated configuration."""
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
    if len(state) > MAX_TENSORS:
        raise ValueError(f"it has {len(state):,} tensors, at most {MAX_TENSORS:,} are read")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"entry {name!r} is a {type(value).__name__}, not a tensor")
        if value.dtype not in FLOATS:
            raise ValueError(f"tensor {name!r} is of {value.dtype}, not of floating-point numbers of 16 to 64 bits")
    plain = {re.sub(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.", "", name): value for name, value in state.items()}
    if len(plain) < len(state):
        raise ValueError("it has a tensor twice, with and without a prefix")
    return plain, content.get("config")


def _beside(path: Path) -> dict[str, Any]:
    """The configuration beside a file of ours."""
    stored = path.with_name(CONFIG)
    if not stored.is_file():
        raise CheckpointError(f"{path} needs its {CONFIG} beside it: the tensors do not say how they are used")
    try:
        if stored.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has {stored.stat().st_size:,} bytes, at most {MAX_HEADER:,} are read")
        return _checked(json.loads(stored.read_bytes()))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{stored} is not a hypernetwork's configuration: {one_line(error)}") from error


def _checked(config: Any) -> dict[str, Any]:
    """A file's configuration, if it is a possible one."""
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}, not a dictionary")
    for key, value in config.items():
        items = value if isinstance(value, list | tuple) else [value]
        # Only then is it safe to print, as errors do.
        if len(items) > MOST_PRIMITIVES or not all(isinstance(item, str | int | float | None) for item in items):
            raise ValueError(f"{key} is neither a number nor a word nor a list of some")
        if any(len(item) > 99 if isinstance(item, str) else abs(item or 0) > 2**63 for item in items):
            raise ValueError(f"{key} is too long")
        if key not in GHNConfig.__dataclass_fields__:
            raise ValueError(f"unknown key {key!r:.60}")
    GHNConfig(**config)
    return config


def _configuration(state: dict[str, Tensor], stated: Any) -> dict[str, Any]:
    """Fields of ``GHNConfig`` of an official file: what the tensors imply, then what the file states."""
    try:
        config = _inferred(state)
    except KeyError as error:
        raise ValueError(f"tensor {error} is missing") from error
    if stated is None:
        return config
    if not isinstance(stated, dict):
        raise ValueError(f"its configuration is a {type(stated).__name__}, not a dictionary")
    for theirs, ours in (("num_classes", "num_classes"), ("hid", "hid"), ("weight_norm", "weight_norm"),
                         ("ve", "virtual_edges"), ("layernorm", "layernorm"), ("max_shape", "max_shape")):  # fmt: skip
        config[ours] = stated.get(theirs, {"weight_norm": False, "ve": False}.get(theirs, config[ours]))
    if config["encoder"] == "graphormer":
        config["heads"] = stated.get("heads", config["heads"])
    elif "heads" not in stated and "is_ghn2" not in stated:
        config["convention"] = "ppuda"
    return config


def _inferred(state: dict[str, Tensor]) -> dict[str, Any]:
    hid = state["embedding.op.weight"].shape[1]
    layers = len([name for name in state if re.fullmatch(r"encoder\.layers\.\d+\.norm1\.weight", name)])
    encoder = "graphormer" if layers else "gated_gnn" if "encoder.gru.weight_ih" in state else "mlp"
    side = 11 if state["embedding.spatial.weight"].shape[0] == 9 else 16
    classes = state["weight_decoder.class_layer.weight"].shape[0]
    decoder = "mlp" if "weight_decoder.fc2.weight" in state else "conv"
    if decoder == "mlp":
        out = round((state["weight_decoder.fc2.weight"].shape[0] / side**2) ** 0.5)
        classes //= max(out, 1)
    else:
        out = round(state["weight_decoder.conv2.weight"].shape[0] ** 0.5)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "num_classes": classes,
        "hid": hid,
        "layers": layers or 1,
        "heads": state["encoder.edge_bias.2.weight"].shape[0] if layers else 8,
        "max_shape": (out, out, side, side),
        "weight_norm": True,
        "virtual_edges": True,
        "layernorm": "norm.weight" in state,
        "window": "centre" if encoder == "graphormer" else "corner",
        "convention": "ghn3",
    }
