"""Command line, such as
``ghnlib predict --ghn SOURCE --model torchvision.models.resnet50 --out FILE.safetensors`` and
``ghnlib coverage --ghn SOURCE --csv FILE``, a table of all torchvision classifiers.
"""

import argparse
import csv
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ghnlib.architectures.vision import UnknownNetwork, network_by_name, torchvision_classifiers
from ghnlib.graphs.parametrized import parts_in, unfold
from ghnlib.graphs.recording import TraceError
from ghnlib.hypernetwork.coverage import coverage
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.released.checkpoints import CheckpointError

TORCHVISION = "torchvision.models."
SOURCES = "digits or cifar10 (in the package), a folder, an official file or released name, a hub repository"
# column -> width and format of its values
COLUMNS = {
    "nodes": (5, "d"), "parameters": (11, ",d"), "predicted %": (11, ".2f"), "trace s": (7, ".2f"),
    "predict s": (9, ".2f"), "norm": (9, ".3f"), "remarks": (0, ""),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 with one message if it failed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # terminals that cannot show every character
    options = _parser().parse_args(arguments)
    try:
        if options.file is not None:
            _check_writable(options.file)  # before the work
        return options.run(options)
    except (CheckpointError, TraceError, SafetensorError, ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--ghn", required=True, help=SOURCES)
    common.add_argument("--num-classes", type=_positive, help="passed to the model; default: the hypernetwork's")
    about = "of the model's input, such as 3 32 32; one number: the side of an image of three channels"
    common.add_argument("--input-shape", type=_positive, nargs="+", metavar="N", help=about)
    parser = argparse.ArgumentParser(prog="ghnlib", description="Graph hypernetworks on the command line.")
    commands = parser.add_subparsers(required=True)

    about = "predict the parameters of a network and write them to a file"
    predict = commands.add_parser("predict", parents=[common], help=about)
    predict.add_argument("--model", required=True, help="importable name of a function or class that makes it")
    about = "safetensors file: parameter name -> tensor"
    predict.add_argument("--out", dest="file", metavar="FILE", required=True, type=Path, help=about)
    about = "of a network with other classes: keep the layer (default), or start with the hypernetwork's rows in turn"
    predict.add_argument("--class-layers", choices=["keep", "resize"], default="keep", help=about)
    predict.set_defaults(run=_predict)

    about = "table of many networks: share of parameters that are predicted, seconds, norm"
    table = commands.add_parser("coverage", parents=[common], help=about)
    about = "importable names; default: all classifiers of torchvision"
    table.add_argument("--models", nargs="+", metavar="MODEL", help=about)
    table.add_argument("--csv", dest="file", type=Path, metavar="FILE", help="write the table there too")
    table.set_defaults(run=_coverage)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _check_writable(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: it is a folder, or you may not write there")


def _predict(options: argparse.Namespace) -> int:
    ghn = GHN.from_pretrained(options.ghn)
    net = _network(ghn, options.model, options).eval()
    about = _input_shape(options), "resize" if options.class_layers == "resize" else None
    with torch.no_grad():
        parameters = ghn.predict(net, *about)
        if parts_in(net):  # of weights that are computed, by what is there: the file has the parts
            net = _network(ghn, options.model, options, with_weights=True).eval()
            ghn.initialize(net, *about)
            parameters = {name: net.state_dict()[name] for name in unfold(net, parameters)}
    save_file({name: value.contiguous() for name, value in parameters.items()}, options.file)
    kept = [name for name, _ in net.named_parameters() if name not in parameters]
    print(f"{options.file}: {len(parameters)} tensors; {len(kept)} not predicted {', '.join(kept[:8])}")
    return 0


def _network(ghn: GHN, model: str, options: argparse.Namespace, with_weights: bool = False) -> nn.Module:
    classes = options.num_classes or ghn.config.num_classes
    try:
        net = network_by_name(model, classes, with_weights)
    except UnknownNetwork:
        raise
    except Exception as error:  # the code of others
        reason = f"{model}(num_classes={classes}) failed: {type(error).__name__}: {error}"
        raise ValueError(f"{reason}. Give a function or class that takes num_classes and needs nothing else") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{model} made a {type(net).__name__}, not a torch.nn.Module")
    return net


def _input_shape(options: argparse.Namespace) -> tuple[int, ...] | None:
    shape = options.input_shape or ()
    return (3, *shape, *shape) if len(shape) == 1 else tuple(shape) or None


def _coverage(options: argparse.Namespace) -> int:
    """Print the table while it grows; the exit status is 1 if a network failed."""
    ghn, models = GHN.from_pretrained(options.ghn), options.models or torchvision_classifiers()
    if known := ghn.config.primitives:
        print(f"beyond the papers' primitives it knows {', '.join(known)}")
    width = max(len(model.removeprefix(TORCHVISION)) for model in models)
    print(" " * 7, f"{'model':{width}}", *(f"{column:>{COLUMNS[column][0]}}" for column in COLUMNS))
    failed = 0
    with open(options.file or os.devnull, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, ["model", *COLUMNS])
        writer.writeheader()
        for i, model in enumerate(models, 1):
            name = model.removeprefix(TORCHVISION)
            try:
                row = _row(ghn, model, options)
            except Exception as error:  # whatever is wrong with one network, the others have their rows
                row = {"remarks": f"failed: {' '.join(str(error).split())}"}
                failed += 1
            writer.writerow({"model": name, **row})
            file.flush()
            cells = [_cell(row.get(column), *COLUMNS[column]) for column in COLUMNS]
            print(f"{i:3}/{len(models):<3}", f"{name:{width}}", *cells, flush=True)
    print(f"{len(models) - failed} networks predicted, {failed} failed")
    return int(failed > 0)


def _row(ghn: GHN, model: str, options: argparse.Namespace) -> dict:
    """Values of the columns. The network stays in training mode, in which auxiliary heads take part."""
    net = _network(ghn, model, options)
    with warnings.catch_warnings(record=True, action="always") as caught:
        found = coverage(ghn, net, _input_shape(options))
    kept = [f"{count} {reason}" for reason, count in Counter(found.skipped.values()).items()]
    return {
        "nodes": found.nodes, "parameters": found.parameters, "predicted %": 100 * found.share,
        "trace s": found.trace_seconds, "predict s": found.predict_seconds, "norm": found.norm,
        "remarks": "; ".join([*(str(warning.message) for warning in caught), *kept]),
    }  # fmt: skip


def _cell(value, width: int, form: str) -> str:
    return f"{'' if value is None else format(value, form):>{width}}"


if __name__ == "__main__":
    sys.exit(main())
