"""Meta-training of hypernetworks: predict a meta-batch of networks, train the predictor through them.

The backward pass has two phases: each child network runs forward and backward alone, with the predicted
parameters as leaves, and one backward pass through the hypernetwork follows. Peak memory is that of one child
and ``PREDICTED_TOGETHER`` predictions, not of the meta-batch, and the gradients are those of the joint backward pass.
Under torch.distributed every rank takes its share of each meta-batch, all with the same images, and gradients are
averaged (GHN-3 appendix).

Every random choice is a function of the seed and the step, so a checkpoint holds no random state: training
continues exactly from any step, and on any number of processes up to the order of sums.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext, suppress
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
from ghnlib.evaluation import exits_of
from ghnlib.hypernetwork import GHN
from ghnlib.images import Augment, ImageSet, mix
from ghnlib.processes import termination_noted

PREDICTED_TOGETHER = 4
"""Networks of a rank predicted at once: larger meta-batches are taken in parts, so that memory does not grow."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to change."""


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class MetaTrainer:
    """One hypernetwork, trained in place, and its optimiser. ``steps_per_epoch``: for schedules in epochs."""

    def __init__(self, ghn: GHN, recipe: Recipe, steps_per_epoch: int):
        self.ghn, self.recipe = ghn, recipe
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            ghn.parameters(), lr=recipe.lr, betas=tuple(recipe.betas), weight_decay=recipe.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.rate_factor(step, steps_per_epoch)
        )
        self.parts = {"ghn": ghn, "optimizer": self.optimizer, "schedule": self.schedule}

    def step(
        self, architectures: Sequence[Architecture], images: Tensor, labels: Tensor, seed: int
    ) -> dict[str, float]:
        """One update with m networks, images (b, 3, s, s) and labels (b,). ``seed``: of the networks' dropout.

        Returns:
            Mean loss, accuracy and norm of the predicted parameters over the networks, gradient norm before
            clipping, number of networks dropped because their loss or gradient was not finite.
        """
        m = len(architectures)
        mine = share_of_rank(range(m), cost=lambda i: len(architectures[i].graph))
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for start in range(0, len(mine), PREDICTED_TOGETHER):
            part = {i: architectures[i] for i in mine[start : start + PREDICTED_TOGETHER]}
            results += self._add_gradients(part, m, images, labels, seed)
        sums = torch.tensor([[1.0, *result] for result in results]).reshape(-1, 4).sum(0).to(images.device)
        self._sum_over_ranks(sums)
        grad_norm = float(nn.utils.clip_grad_norm_(self.ghn.parameters(), self.recipe.clip))
        if sums[0] and math.isfinite(grad_norm):
            self.optimizer.step()
        self.schedule.step()
        loss, correct, norm = (sums[1:] / sums[0]).tolist()  # not a number if there is no network left
        skipped = m - int(sums[0]) if math.isfinite(grad_norm) else m
        means = {"loss": loss, "accuracy": 100 * correct, "parameter_norm": norm}
        return means | {"grad_norm": grad_norm, "skipped": skipped}

    def _add_gradients(self, part: dict[int, Architecture], m: int, images, labels, seed: int) -> list[tuple]:
        """Predict some of the m networks, run each, add its share of the gradient to the hypernetwork's; returns what
        ``_run_child`` returns, of the networks whose loss and gradients are finite: the others are dropped."""
        predictions = self.ghn([architecture.graph for architecture in part.values()])
        outputs, gradients, results = [], [], []
        for (i, architecture), prediction in zip(part.items(), predictions):
            leaves = {name: p.detach().requires_grad_() for name, p in prediction.items()}
            result = self._run_child(architecture, leaves, images, labels, mix(seed, i))
            if all(map(math.isfinite, result)) and _finite(leaves.values()):
                results.append(result)
                outputs += prediction.values()
                gradients += [leaf.grad for leaf in leaves.values()]
        if outputs:
            torch._foreach_div_(gradients, m)
            torch.autograd.backward(outputs, gradients)
        return results

    def _run_child(self, architecture, leaves: dict[str, Tensor], images, labels, seed: int) -> tuple:
        """Loss (sum over exits), share of images classified correctly (by the last exit), norm of parameters; gradients
        go to the leaves."""
        torch.manual_seed(seed)
        net = _network(architecture, self.recipe.dropout)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            exits = [logits.float() for logits in exits_of(torch.func.functional_call(net, leaves, (images,)))]
        loss = sum(F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing) for logits in exits)
        norms = torch.stack(torch._foreach_norm(list(leaves.values())))
        penalty = norms.square() if self.recipe.penalty == "squared" else norms
        (loss + self.recipe.gamma * penalty.sum()).backward()
        correct = (exits[-1].detach().argmax(1) == labels).float().mean()
        return loss.item(), correct.item(), norms.sum().item()

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
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


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

    Architectures, the first ``recipe.architectures``, are drawn without replacement within a pass, in a new order each
    pass. Meta-batches with too many nodes are passed over, as in the papers.
    """
    count = len(architectures) if recipe.architectures is None else recipe.architectures
    if not recipe.meta_batch <= count <= len(architectures):
        raise TrainingError(
            f"meta_batch={recipe.meta_batch} and architectures={recipe.architectures} need as many architectures, "
            f"there are {len(architectures)}"
        )
    per_pass = count // recipe.meta_batch
    for candidate in range(position, position + 1000):
        order = _permutation(count, seed, candidate // per_pass)
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

    SIGTERM ends the step in hand, writes a checkpoint and exits with status 143.

    Args:
        ghn: initialised hypernetwork, trained in place.
        folder: for ``checkpoint.pt`` (and the one before it) and ``history.csv``; the checkpoint of another
            configuration is replaced.
        seed: decides the order of images and architectures, augmentation and dropout.
        validate: called on every rank each ``recipe.validate_every`` steps; its values join the history.

    Returns:
        One row a log interval: step, means of what ``MetaTrainer.step`` returns, deviation of the gradient norm,
        validation values.

    Raises:
        TrainingError: losses that are not finite have become the rule, a checkpoint cannot be written, or another
            process trains in ``folder``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = MetaTrainer(ghn, recipe, max(1, len(images) // recipe.batch_size))
    identity = json.dumps([asdict(ghn.config), asdict(recipe), asdict(augment or Augment()), seed], sort_keys=True)
    with _only_writer(folder):
        start = {"step": 0, "position": 0, "skipped": 0, "window": [], "history": []}
        progress = _resume(trainer, folder, identity) or start
        _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress)
        if is_first_rank():  # again: the last process may have been killed between checkpoint and history
            _write_history(progress["history"], folder)
    return pd.DataFrame(progress["history"])


def _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress) -> None:
    recipe = trainer.recipe
    batches = images.stream(recipe.batch_size, seed, progress["step"], augment)
    hidden = None if is_first_rank() else True
    with (
        tqdm(total=recipe.steps, initial=progress["step"], disable=hidden, unit="step") as bar,
        termination_noted() as terminated,
    ):
        while progress["step"] < recipe.steps:
            step = progress["step"]
            chosen, progress["position"] = sample_meta_batch(architectures, recipe, seed, progress["position"])
            progress["window"].append(trainer.step(chosen, *next(batches), seed=mix(seed, 2, step)))
            progress["skipped"] += progress["window"][-1]["skipped"]
            progress["step"] = step = step + 1
            bar.update()
            _stop_if_diverged(progress["skipped"], step * recipe.meta_batch)
            logged = step % recipe.log_every == 0 or step == recipe.steps
            if logged:
                window = pd.DataFrame(progress["window"])
                deviation = float(window["grad_norm"].std(ddof=0))
                row = {"step": step, **window.mean().to_dict(), "grad_norm_deviation": deviation}
                progress["window"] = []
                if validate and (step % recipe.validate_every == 0 or step == recipe.steps):
                    row |= validate(trainer.ghn)
                progress["history"].append(row)
                values = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
                _say(f"step {step:>{len(str(recipe.steps))}}/{recipe.steps}  {values}")
            stop = _on_any_rank(terminated(), images.labels.device)
            if (logged or stop) and is_first_rank():
                _save({**trainer.state_dict(), "progress": progress, "identity": identity}, folder)
            if stop:
                _say(f"asked to stop: saved after step {step}; started again, it resumes")
                raise SystemExit(143)


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """The same answer on all ranks: one that stopped alone would leave the others waiting for it."""
    if not distributed.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    distributed.all_reduce(count)
    return bool(count)


def _stop_if_diverged(skipped: int, total: int) -> None:
    if skipped > 20 and skipped > total / 50:
        raise TrainingError(
            f"{skipped} of {total} networks gave a loss or gradient that is not finite (limit: 1 in 50): "
            "lower train.lr or train.clip, or keep weight_norm on"
        )


def _say(text: str) -> None:
    if is_first_rank():
        with suppress(BrokenPipeError):  # who read this may have been killed: the training is to be saved all the same
            tqdm.write(text)


def _save(state: dict, folder: Path) -> None:
    """Write a checkpoint, then rename it: at any moment a kill or a full disk leaves a good one, this or the last."""
    new, last = folder / "checkpoint.new", folder / "checkpoint.pt"
    try:
        with new.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        if last.exists():
            os.replace(last, folder / "checkpoint.previous.pt")
        os.replace(new, last)
        _write_history(state["progress"]["history"], folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free >> 20
        raise TrainingError(f"cannot write a checkpoint to {folder} ({error}, {free} MiB free); "
                            "the last one is intact, free some space and start again") from error  # fmt: skip


def _write_history(rows: list[dict], folder: Path) -> None:
    pd.DataFrame(rows).to_csv(folder / "history.new", index=False)
    os.replace(folder / "history.new", folder / "history.csv")


def _resume(trainer: MetaTrainer, folder: Path, identity: str) -> dict | None:
    for name in "checkpoint.pt", "checkpoint.previous.pt":
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _say(f"{folder / name} is damaged ({error}): trying the one before it")
            continue
        if state["identity"] != identity:
            _say("the checkpoint here is of another configuration: starting anew")
            return None
        trainer.load_state_dict(state)
        _say(f"resuming after step {state['progress']['step']}")
        return state["progress"]
    return None


@contextmanager
def _only_writer(folder: Path):
    try:
        with filelock.FileLock(folder / "lock", timeout=0) if is_first_rank() else nullcontext():
            yield
    except filelock.Timeout as error:
        raise TrainingError(f"another process is training in {folder}: wait for it or stop it") from error
