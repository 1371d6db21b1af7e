"""Meta-training of hypernetworks: predict a meta-batch of networks, train the predictor through them.

The backward pass has two phases: each child network runs forward and backward alone, with the predicted
parameters as leaves, and one backward pass through the hypernetwork follows. Peak memory is that of one child,
not of the meta-batch, and the gradients are those of the joint backward pass. Under torch.distributed every rank
takes its share of each meta-batch, all with the same images, and gradients are averaged (GHN-3 appendix).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import filelock
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm import tqdm

from ghnlib.architectures import Architecture
from ghnlib.config import Recipe
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, ImageSet, mix


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to change."""


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def learning_rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step as a share of ``recipe.lr``."""
    if recipe.schedule == "cosine":
        warmup = recipe.warmup * recipe.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))
    if recipe.schedule == "multistep":
        return 0.1 ** sum(step >= milestone * recipe.steps for milestone in recipe.milestones)
    if recipe.schedule == "cosine-epochs":
        epochs = math.ceil(recipe.steps / steps_per_epoch)
        return _cosine_epochs(step // steps_per_epoch, epochs, max(1, round(recipe.warmup * epochs)), recipe.lr)
    raise ValueError(f"schedule={recipe.schedule!r} is not one of cosine, cosine-epochs, multistep")


def _cosine_epochs(epoch: int, epochs: int, warmup: int, lr: float) -> float:
    """GHN-3: from 1e-5 in equal steps over the warm-up epochs, then cosine; constant within an epoch."""
    if epoch < warmup - 1:
        return (1e-5 + (lr - 1e-5) * epoch / (warmup - 1)) / lr
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))))


class MetaTrainer:
    """One hypernetwork and its optimiser.

    Args:
        ghn: the hypernetwork, trained in place.
        recipe: see ``Recipe``.
        steps_per_epoch: batches in one pass over the images, for schedules in epochs.
    """

    def __init__(self, ghn: GHN, recipe: Recipe, steps_per_epoch: int):
        self.ghn, self.recipe = ghn, recipe
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            ghn.parameters(), lr=recipe.lr, betas=tuple(recipe.betas), weight_decay=recipe.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(recipe, step, steps_per_epoch)
        )

    def step(
        self, architectures: Sequence[Architecture], images: Tensor, labels: Tensor, seed: int
    ) -> dict[str, float]:
        """One update.

        Args:
            architectures: the meta-batch, m networks.
            images: (b, 3, s, s).
            labels: (b,).
            seed: of the networks' dropout.

        Returns:
            Mean loss, accuracy and norm of the predicted parameters over the networks, gradient norm before
            clipping, number of networks dropped because their loss or gradient was not finite.
        """
        m = len(architectures)
        mine = share_of_rank(range(m), cost=lambda i: len(architectures[i].graph))
        self.optimizer.zero_grad(set_to_none=True)
        predictions = self.ghn([architectures[i].graph for i in mine])
        leaves = [{name: p.detach().requires_grad_() for name, p in prediction.items()} for prediction in predictions]
        results = [self._run_child(architectures[i], own, images, labels, mix(seed, i)) for i, own in zip(mine, leaves)]
        finite = [k for k in range(len(mine)) if all(map(math.isfinite, results[k])) and _finite(leaves[k].values())]
        if finite:
            torch.autograd.backward(
                [p for k in finite for p in predictions[k].values()],
                [leaf.grad / m for k in finite for leaf in leaves[k].values()],
            )
        sums = torch.tensor([[1.0, *results[k]] for k in finite]).reshape(-1, 4).sum(0).to(images.device)
        self._sum_over_ranks(sums)
        grad_norm = float(nn.utils.clip_grad_norm_(self.ghn.parameters(), self.recipe.clip))
        if sums[0] and math.isfinite(grad_norm):
            self.optimizer.step()
        self.schedule.step()
        loss, correct, norm = (sums[1:] / sums[0].clamp(min=1)).tolist()
        skipped = m - int(sums[0]) if math.isfinite(grad_norm) else m
        means = {"loss": loss, "accuracy": 100 * correct, "parameter_norm": norm}
        return means | {"grad_norm": grad_norm, "skipped": skipped}

    def _run_child(
        self, architecture, leaves: dict[str, Tensor], images, labels, seed: int
    ) -> tuple[float, float, float]:
        """Loss, share of images classified correctly, norm of parameters; gradients go to the leaves."""
        torch.manual_seed(seed)
        net = _network(architecture, self.recipe.dropout)
        logits = torch.func.functional_call(net, leaves, (images,))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        norm = torch.stack(torch._foreach_norm(list(leaves.values()))).sum()
        (loss + self.recipe.gamma * norm).backward()
        correct = (logits.detach().argmax(1) == labels).float().mean()
        return loss.item(), correct.item(), norm.item()

    def _sum_over_ranks(self, sums: Tensor) -> None:
        if not distributed.is_initialized():
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.ghn.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        distributed.all_reduce(sums)
        for p, part in zip(self.ghn.parameters(), flat.split([g.numel() for g in gradients])):
            p.grad = part.view_as(p)

    def state_dict(self) -> dict:
        parts = {"ghn": self.ghn, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.ghn.load_state_dict(state["ghn"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@lru_cache(maxsize=1024)
def _network(architecture: Architecture, dropout: bool) -> nn.Module:
    # Without running statistics, training mode differs from evaluation in dropout alone.
    return architecture.build(device="meta").train(dropout)


def is_first_rank() -> bool:
    """Whether this process reports and writes: the only one, or rank 0."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def share_of_rank(items: Sequence, cost: Callable) -> list:
    """This process's part of the items: all without torch.distributed, else every world-size-th by falling cost."""
    if not distributed.is_initialized():
        return list(items)
    return sorted(items, key=cost, reverse=True)[distributed.get_rank() :: distributed.get_world_size()]


def _finite(leaves: Iterable[Tensor]) -> bool:
    gradients = [leaf.grad for leaf in leaves]
    return all(g is not None for g in gradients) and bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def sample_meta_batch(
    architectures: Sequence[Architecture], recipe: Recipe, seed: int, position: int
) -> tuple[list[Architecture], int]:
    """The next meta-batch and the position after it: a pure function of its arguments.

    Architectures are drawn without replacement within a pass, in a new order each pass. Meta-batches with too
    many nodes are passed over, as in the papers.
    """
    if len(architectures) < recipe.meta_batch:
        raise TrainingError(
            f"meta_batch={recipe.meta_batch} needs as many architectures, there are {len(architectures)}"
        )
    per_pass = len(architectures) // recipe.meta_batch
    for candidate in range(position, position + 1000):
        order = _permutation(len(architectures), seed, candidate // per_pass)
        start = candidate % per_pass * recipe.meta_batch
        chosen = [architectures[i] for i in order[start : start + recipe.meta_batch]]
        if recipe.meta_batch == 1 or sum(len(a.graph) for a in chosen) <= recipe.max_nodes * recipe.meta_batch:
            return chosen, candidate + 1
    raise TrainingError(
        f"1000 meta-batches in a row have more than max_nodes={recipe.max_nodes} nodes a network: raise the limit"
    )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, pass_number: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, 3, pass_number))).tolist()


def train_ghn(
    ghn: GHN,
    architectures: Sequence[Architecture],
    images: ImageSet,
    recipe: Recipe,
    folder: str | Path,
    seed: int,
    augment: Augment | None = None,
    validate: Callable[[GHN], dict[str, float]] | None = None,
) -> pd.DataFrame:
    """Train a hypernetwork; started again after an interruption, it continues from its last checkpoint.

    Args:
        ghn: initialised hypernetwork, trained in place.
        architectures: training networks.
        images: training images.
        recipe: see ``Recipe``.
        folder: for ``checkpoint.pt`` and ``history.csv``; the checkpoint of another configuration is replaced.
        seed: decides the order of images and architectures, augmentation and dropout.
        augment: of the training images.
        validate: called on every rank each ``recipe.validate_every`` steps; its values join the history.

    Returns:
        One row a log interval: step, means of what ``MetaTrainer.step`` returns, and validation values.

    Raises:
        TrainingError: losses that are not finite have become the rule, or another process trains in ``folder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = MetaTrainer(ghn, recipe, max(1, len(images) // recipe.batch_size))
    identity = json.dumps([asdict(ghn.config), asdict(recipe), asdict(augment or Augment()), seed], sort_keys=True)
    with _only_writer(folder):
        progress = _resume(trainer, folder, identity) or {"step": 0, "position": 0, "skipped": 0, "history": []}
        _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress)
    return pd.DataFrame(progress["history"])


def _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress) -> None:
    recipe, window = trainer.recipe, []
    batches = images.stream(recipe.batch_size, seed, progress["step"], augment)
    bar = tqdm(total=recipe.steps, initial=progress["step"], disable=None if is_first_rank() else True, unit="step")
    while progress["step"] < recipe.steps:
        step = progress["step"]
        chosen, progress["position"] = sample_meta_batch(architectures, recipe, seed, progress["position"])
        window.append(trainer.step(chosen, *next(batches), seed=mix(seed, 2, step)))
        progress["skipped"] += window[-1]["skipped"]
        progress["step"] = step = step + 1
        bar.update()
        _stop_if_diverged(progress["skipped"], step * recipe.meta_batch)
        if step % recipe.log_every and step != recipe.steps:
            continue
        row = {"step": step, **pd.DataFrame(window).mean().to_dict()}
        window = []
        if validate and (step % recipe.validate_every == 0 or step == recipe.steps):
            row |= validate(trainer.ghn)
        progress["history"].append(row)
        if is_first_rank():
            _report(row, recipe.steps)
            _save({**trainer.state_dict(), "progress": progress, "identity": identity}, folder)
    bar.close()


def _stop_if_diverged(skipped: int, total: int) -> None:
    if skipped > 20 and skipped > total / 50:
        raise TrainingError(
            f"{skipped} of {total} networks gave a loss or gradient that is not finite (limit: 1 in 50): "
            "lower train.lr or train.clip, or keep weight_norm on"
        )


def _say(text: str) -> None:
    if is_first_rank():
        tqdm.write(text)


def _report(row: dict, steps: int) -> None:
    values = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
    _say(f"step {row['step']:>{len(str(steps))}}/{steps}  {values}")


def _save(state: dict, folder: Path) -> None:
    """Write next to the last checkpoint, then replace it: a crash or a full disk leaves the last good one."""
    new = folder / "checkpoint.new"
    try:
        torch.save(state, new)
        os.replace(new, folder / "checkpoint.pt")
        pd.DataFrame(state["progress"]["history"]).to_csv(folder / "history.csv", index=False)
    except OSError as error:
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free >> 20
        raise TrainingError(f"cannot write a checkpoint to {folder} ({error.strerror}, {free} MiB free); "
                            "the last one is intact, free some space and start again") from error  # fmt: skip


def _resume(trainer: MetaTrainer, folder: Path, identity: str) -> dict | None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        _say("the checkpoint here is of another configuration: starting anew")
        return None
    trainer.load_state_dict(state)
    _say(f"resuming after step {state['progress']['step']}")
    return state["progress"]


@contextmanager
def _only_writer(folder: Path):
    if not is_first_rank():
        yield
        return
    try:
        with filelock.FileLock(folder / "lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise TrainingError(f"another process is training in {folder}: wait for it or stop it") from error
