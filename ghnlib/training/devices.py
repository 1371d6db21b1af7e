"""Where computations run: on a GPU or on cores."""

import os

import torch

from ghnlib.training.checkpointing import TrainingError


def device_of(choice: str) -> torch.device:
    """Where images, networks and hypernetworks are. ``choice``: the key ``device`` of params.yaml; auto is a GPU where
    torch finds one. Processes that torchrun has started on one node have a GPU each. Raises TrainingError if there is
    no GPU, or a node has more processes than GPUs."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("device = cuda, but torch finds no GPU here: set device: auto, or install its driver and a "
                            "torch built for CUDA")  # fmt: skip
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise TrainingError(f"there are {count} GPUs here, not {rank + 1} or more: lower train.devices")
    return torch.device("cuda", rank)
