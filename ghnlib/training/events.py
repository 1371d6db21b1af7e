"""The history of a training as events for TensorBoard."""

from collections.abc import Callable
from pathlib import Path

from ghnlib.params_file import NO_TENSORBOARD
from ghnlib.training.checkpointing import TrainingError


def event_log(folder: Path) -> Callable[[dict[str, float]], None]:
    """A ``log`` for ``train_ghn`` that writes each number of a row as a scalar. Resumed, a training goes on with its
    first row: what a process that was killed has written from that step on no longer counts. Raises TrainingError if
    tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # an optional dependency
    except ImportError as error:
        raise TrainingError(f"logger = tensorboard: {NO_TENSORBOARD}") from error
    writer: SummaryWriter | None = None

    def log(row: dict[str, float]) -> None:
        nonlocal writer
        step = int(row["step"])
        writer = writer or SummaryWriter(str(folder), purge_step=step)
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, step)
        writer.flush()  # a checkpoint of this step follows

    return log
