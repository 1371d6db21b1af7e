"""Official hypernetwork files of PPUDA and GHN-3, read without running what they contain."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import re
from pathlib import Path
from typing import Any

import joblib.numpy_pickle
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

HUB_REPOSITORY = "SamsungSAILMontreal/ghn3"
RELEASED = ("ghn3tm8.pt", "ghn3sm8.pt", "ghn3lm8.pt", "ghn3xlm16.pt", "ghn2.pt")

# Official tensor name -> ours. Released GHN-3 files keep the three node tables at top level, later ones in gnn.0.
_NAMES = [
    (r"^module\.", ""),
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
    (r"^decoder\.fc\.0\.", "weight_decoder.fc."),
    (r"^decoder\.conv\.0\.", "weight_decoder.conv1."),
    (r"^decoder\.conv\.2\.", "weight_decoder.conv2."),
    (r"^decoder\.class_layer_predictor\.1\.", "weight_decoder.class_layer."),
    (r"^decoder_1d\.fc\.0\.", "vector_decoder.fc1."),
    (r"^decoder_1d\.fc\.2\.", "vector_decoder.fc2."),
    (r"^bias_class\.1\.", "vector_decoder.class_layer."),
]


class CheckpointError(RuntimeError):
    """A hypernetwork file that is missing, truncated, unsafe or does not fit its configuration."""


def is_official(source: str | Path) -> bool:
    """Whether ``source`` names an official file rather than a folder of ``save_pretrained`` or a hub repository."""
    return Path(source).is_file() or Path(source).suffix in (".pt", ".pth", ".joblib")


def read_official(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an official file.

    Args:
        source: a path, or a released name (``RELEASED``), which is downloaded from the hub.

    Returns:
        Fields of ``GHNConfig``, and tensors under the names that ``GHN`` uses.
    """
    content = read_tensors(_locate(source))
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}, not a dictionary of tensors")
    state = content.get("state_dict", content)
    for name, value in state.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise CheckpointError(f"{source}: entry {name!r} is a {type(value).__name__}, not a tensor")
    state = {our_name(name): torch.as_tensor(value) for name, value in state.items()}
    # PPUDA keeps the decoder's 1x1 convolutions as such; here they are linear layers.
    state = {name: value.flatten(1) if value.ndim == 4 else value for name, value in state.items()}
    return _configuration(state, content.get("config"), source), state


def our_name(name: str) -> str:
    """The name in ``GHN.state_dict`` of a tensor of an official file."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if str(source) not in RELEASED:
        raise CheckpointError(f"{source}: no such file, and not a released name ({', '.join(RELEASED)})")
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, str(source)))
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"could not download {source} from huggingface.co/{HUB_REPOSITORY} ({type(error).__name__}). "
            f"Download it elsewhere, put it in {Path.cwd()} and try again, or pass its path"
        ) from error


def read_tensors(path: Path) -> Any:
    """What a file of torch, joblib or safetensors holds, if these are tensors, arrays and plain values alone.

    Raises:
        CheckpointError: it is something else, truncated, or wants to run code.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file, or is truncated: {_reason(error)}") from error
    with path.open("rb") as file:
        start = file.read(16)
    legacy_torch = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in start
    try:
        return _torch_load(path) if start[:2] == b"PK" or legacy_torch else _joblib_load(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: {_reason(error)}") from error
    except (EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a hypernetwork file, or is truncated: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"it wants to load {wanted[1]}, which is not tensor data"
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _torch_load(source: Path | io.BytesIO) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(source, map_location="cpu", weights_only=True)


_SAFE = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): joblib.numpy_pickle.NumpyArrayWrapper,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    # joblib nests a torch file for each tensor storage.
    ("torch.storage", "_load_from_bytes"): lambda data: _torch_load(io.BytesIO(data)),
}


class _TensorUnpickler(joblib.numpy_pickle.NumpyUnpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _SAFE[module, name]


def _joblib_load(path: Path) -> Any:
    with path.open("rb") as file:
        return _TensorUnpickler(str(path), file, ensure_native_byte_order=True).load()


def _configuration(state: dict[str, Tensor], stored: dict | None, source: str | Path) -> dict[str, Any]:
    """Fields of ``GHNConfig``: what the tensors imply, then what the file states."""
    try:
        config = _inferred(state)
    except KeyError as error:
        raise CheckpointError(f"{source}: not a hypernetwork, tensor {error} is missing") from error
    if stored is None:
        return config
    for theirs, ours in (("num_classes", "num_classes"), ("hid", "hid"), ("weight_norm", "weight_norm"),
                         ("ve", "virtual_edges"), ("layernorm", "layernorm"), ("max_shape", "max_shape")):  # fmt: skip
        config[ours] = stored.get(theirs, {"weight_norm": False, "ve": False}.get(theirs, config[ours]))
    if config["encoder"] == "graphormer":
        config["heads"] = stored.get("heads", config["heads"])
    if "heads" not in stored and "is_ghn2" not in stored:
        config["convention"] = "ppuda"
    return config


def _inferred(state: dict[str, Tensor]) -> dict[str, Any]:
    hid = state["embedding.op.weight"].shape[1]
    layers = len([name for name in state if re.fullmatch(r"encoder\.layers\.\d+\.norm1\.weight", name)])
    encoder = "graphormer" if layers else "gated_gnn" if "encoder.gru.weight_ih" in state else "mlp"
    out = round(state["weight_decoder.conv2.weight"].shape[0] ** 0.5)
    side = 11 if state["embedding.spatial.weight"].shape[0] == 9 else 16
    return {
        "encoder": encoder,
        "num_classes": state["weight_decoder.class_layer.weight"].shape[0],
        "hid": hid,
        "layers": layers or 1,
        "heads": 16 if hid > 64 else 8,
        "max_shape": (out, out, side, side),
        "weight_norm": True,
        "virtual_edges": True,
        "layernorm": "norm.weight" in state,
        "window": "centre" if encoder == "graphormer" else "corner",
        "convention": "ghn3",
    }
