"""Files of a training that survive a kill: checkpoints, history."""

import os
import shutil
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import filelock
import pandas as pd
import torch
from tqdm import tqdm

from ghnlib.processes import sole_holder
from ghnlib.training.ranks import is_first_rank, sum_over_ranks
from ghnlib.training.step import MetaTrainer

ENDING = 60
"""Seconds that a training is given to save and end before another in its folder is refused."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to change."""


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_first_rank():
        with suppress(BrokenPipeError):  # who read this may have been killed: the training is to be saved all the same
            tqdm.write(text)


def save(state: dict, folder: Path) -> None:
    """Write a checkpoint, then rename it: at any moment a kill or a full disk leaves a good one, this or the last.
    Raises TrainingError if it cannot be written."""
    new, last = folder / "checkpoint.new", folder / "checkpoint.pt"
    try:
        with new.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, folder / "checkpoint.previous.pt")
        os.replace(new, last)
        if rows := state["progress"]["history"]:
            write_history(rows, folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free >> 20
        raise TrainingError(f"cannot write a checkpoint to {folder} ({error}, {free} MiB free); "
                            "the last one is intact, free some space and start again") from error  # fmt: skip


def write_history(rows: list[dict], folder: Path) -> None:
    """Write history.csv anew, one row a line of the log."""
    pd.DataFrame(rows).to_csv(folder / "history.new", index=False)
    os.replace(folder / "history.new", folder / "history.csv")


def resume_together(trainer: MetaTrainer, folder: Path, identity: str) -> dict:
    """Progress of the last checkpoint, the same on all ranks. The first reads alone: it may set files aside. Raises
    TrainingError if not all ranks see its folder."""
    progress = _resume(trainer, folder, identity) if is_first_rank() else None
    device = next(trainer.ghn.parameters()).device
    step = sum_over_ranks(progress["step"] if progress else 0, device)
    progress = progress or _resume(trainer, folder, identity)
    if others := sum_over_ranks(progress["step"] != step, device):  # all end: one alone would leave the others waiting
        raise TrainingError(f"the first process would start after step {step:.0f}, {others:.0f} others would not: "
                            f"{folder} must be one folder that all nodes see")  # fmt: skip
    return progress


START = {"step": 0, "position": 0, "skipped": [], "losses": [], "window": [], "history": []}
"""Progress of a training before its first step."""


def _resume(trainer: MetaTrainer, folder: Path, identity: str) -> dict:
    for name in "checkpoint.pt", "checkpoint.previous.pt":
        try:
            state = _read(folder / name, trainer)
        except FileNotFoundError:
            continue
        except Exception as error:  # unpickling what was not pickled here may raise anything
            say(f"{folder / name} is damaged ({error}): now checkpoint.damaged.pt, trying the one before it")
            os.replace(folder / name, folder / "checkpoint.damaged.pt")  # or the next save would take it for good
            continue
        if state["identity"] != identity or _shapes(state["ghn"]) != _shapes(trainer.ghn.state_dict()):
            say("the checkpoint here is of another start, configuration or data: now checkpoint.old.pt, starting anew")
            os.replace(folder / name, folder / "checkpoint.old.pt")
            (folder / "checkpoint.previous.pt").unlink(missing_ok=True)
            break
        trainer.load_state_dict(state)
        say(f"resuming after step {state['progress']['step']}")
        return state["progress"]
    return {key: [*value] if isinstance(value, list) else value for key, value in START.items()}


def _read(path: Path, trainer: MetaTrainer) -> dict:
    """A checkpoint. Raises what ``torch.load`` does, and ValueError if the checksum of a part is not that which
    ``torch.save`` has written beside it, or parts are missing."""
    with zipfile.ZipFile(path) as archive:
        if changed := archive.testzip():
            raise ValueError(f"{changed} has changed since it was written")
    state = torch.load(path, map_location="cpu", weights_only=True)
    known = isinstance(state, dict) and {"identity", "progress", *trainer.parts} <= {*state}
    if not (known and {*START} <= {*state["progress"]}):
        raise ValueError("it was not written by a training")
    return state


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


@contextmanager
def only_writer(folder: Path):
    """Within, no other process trains in the folder. Raises TrainingError if one does."""
    try:
        with sole_holder(folder / "lock", f"a training in {folder}", ENDING, say) if is_first_rank() else nullcontext():
            yield
    except filelock.Timeout as error:
        raise TrainingError(f"another process is training in {folder}: wait for it or stop it") from error
