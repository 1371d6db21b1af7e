"""Command line, such as
``python -m ghnlib predict --ghn SOURCE --model torchvision.models.resnet50 --out FILE.safetensors``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ghnlib.checkpoints import CheckpointError
from ghnlib.hypernetwork import GHN
from ghnlib.tracing import TraceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 with one message if it failed."""
    parser = argparse.ArgumentParser(prog="python -m ghnlib", description="Graph hypernetworks on the command line.")
    commands = parser.add_subparsers(required=True)
    predict = commands.add_parser("predict", help="predict the parameters of a network and write them to a file")
    predict.add_argument("--ghn", required=True, help="a folder, an official file or released name, a hub repository")
    predict.add_argument("--model", required=True, help="importable name of a function or class without arguments")
    predict.add_argument("--num-classes", type=int, help="passed to the model; default: the hypernetwork's")
    predict.add_argument("--input-shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of the model's input")
    predict.add_argument("--out", required=True, type=Path, help="safetensors file: parameter name -> tensor")
    options = parser.parse_args(arguments)
    try:
        _predict(options)
    except (CheckpointError, TraceError, ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _predict(options: argparse.Namespace) -> None:
    ghn = GHN.from_pretrained(options.ghn)
    net = _network(options.model, options.num_classes or ghn.config.num_classes)
    with torch.no_grad():
        parameters = ghn.predict(net, options.input_shape)
    save_file({name: value.contiguous() for name, value in parameters.items()}, options.out)
    kept = [name for name, _ in net.named_parameters() if name not in parameters]
    print(f"{options.out}: {len(parameters)} tensors; {len(kept)} not predicted {', '.join(kept[:8])}")


def _network(name: str, num_classes: int) -> nn.Module:
    module, _, function = name.rpartition(".")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no network {name!r}: give an importable name such as torchvision.models.resnet50") from error
    with torch.device("meta"):
        return build(num_classes=num_classes).eval()


if __name__ == "__main__":
    sys.exit(main())
