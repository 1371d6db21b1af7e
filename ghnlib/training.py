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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
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
NETWORKS_KEPT = 1024
"""Modules in memory, about 1 MiB each at the papers' scale; those of larger pools are built anew: their turn is far."""
RECENT = 1000
"""Steps over which dropped networks are counted."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to change."""


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class MetaTrainer:
    """One hypernetwork, trained in place, and its optimiser. ``steps_per_epoch``: for schedules in epochs;
    ``networks_kept``: in memory for their next turn."""

    def __init__(self, ghn: GHN, recipe: Recipe, steps_per_epoch: int, networks_kept: int = 64):
        self.ghn, self.recipe = ghn, recipe
        # Without running statistics, training mode differs from evaluation in dropout alone.
        self._network = lru_cache(networks_kept)(lambda a: a.build(device="meta").train(recipe.dropout))
        # Misaligned, a graph's states depend on all graphs read before it: they are those of the whole meta-batch.
        self._together = PREDICTED_TOGETHER if ghn.config.batching == "aligned" else recipe.meta_batch
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
        for start in range(0, len(mine), self._together):
            part = {i: architectures[i] for i in mine[start : start + self._together]}
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
        net = self._network(architecture)
        torch.manual_seed(seed)
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


def is_first_rank() -> bool:
    """Whether this process reports and writes: the only one, or rank 0."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def share_of_rank(items: Sequence, cost: Callable) -> list:
    """This process's part of the items, in their order: all without torch.distributed. As in PPUDA, parts are of equal
    size but for one item and of about equal cost: the costliest first, each to the part with room that costs least."""
    if not distributed.is_initialized():
        return list(items)
    parts: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    room, total = math.ceil(len(items) / len(parts)), lambda part: sum(cost(items[i]) for i in part)
    for i in sorted(range(len(items)), key=lambda i: cost(items[i]), reverse=True):
        min((part for part in parts if len(part) < room), key=total).append(i)
    return [items[i] for i in sorted(parts[distributed.get_rank()])]


def sum_over_ranks(value: float, device: torch.device) -> float:
    """A number summed over all ranks, the same on each: it waits for the others."""
    number = torch.tensor(value, dtype=torch.float64, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(number)
    return float(number)


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
        if recipe.meta_batch == 1 or sum(len(a.graph) for a in chosen) <= recipe.max_nodes * max(8, recipe.meta_batch):
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
    about: Mapping | None = None,
) -> pd.DataFrame:
    """Train a hypernetwork; started again after an interruption, it continues from its last checkpoint.

    SIGTERM ends the step in hand, writes a checkpoint and exits with status 143.

    Args:
        ghn: initialised hypernetwork, trained in place.
        folder: for ``checkpoint.pt`` (and the one before it; that of another training becomes ``checkpoint.old.pt``),
            ``history.csv`` and ``throughput.csv`` (networks and images through them a second). All nodes must see it.
        seed: decides the order of images and architectures, augmentation and dropout.
        validate: called on every rank each ``recipe.validate_every`` steps; its values join the history.
        about: what else the training is of, such as the images; with other values it starts anew.

    Returns:
        One row a log interval: step, means of what ``MetaTrainer.step`` returns, deviation of the gradient norm,
        validation values.

    Raises:
        TrainingError: losses that are not finite have become the rule, a checkpoint cannot be written, another
            process trains in ``folder``, or not all ranks see it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pool = recipe.architectures or len(architectures)
    trainer = MetaTrainer(ghn, recipe, max(1, len(images) // recipe.batch_size), pool * (pool <= NETWORKS_KEPT))
    decisive = replace(recipe, log_every=1, validate_every=1)  # they change nothing but the history
    parts = [asdict(ghn.config), asdict(decisive), asdict(augment or Augment()), seed, about]
    identity = json.dumps(parts, sort_keys=True, default=repr)
    with _only_writer(folder):
        progress = _resume_together(trainer, folder, identity)
        _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress)
        if is_first_rank():  # again: the last process may have been killed between checkpoint and history
            _write_history(progress["history"], folder)
    return pd.DataFrame(progress["history"])


def _loop(trainer, architectures, images, seed, augment, validate, folder, identity, progress) -> None:
    recipe, device = trainer.recipe, next(trainer.ghn.parameters()).device
    batches = images.stream(recipe.batch_size, seed, progress["step"], augment)
    hidden = None if is_first_rank() else True
    with (
        tqdm(total=recipe.steps, initial=progress["step"], disable=hidden, unit="step") as bar,
        termination_noted() as terminated,
    ):
        since, started = progress["step"], time.monotonic()
        while progress["step"] < recipe.steps:
            step = progress["step"]
            chosen, progress["position"] = sample_meta_batch(architectures, recipe, seed, progress["position"])
            progress["window"].append(trainer.step(chosen, *next(batches), seed=mix(seed, 2, step)))
            progress["skipped"] = [*progress["skipped"], progress["window"][-1]["skipped"]][-RECENT:]
            progress["step"] = step = step + 1
            bar.update()
            _stop_if_diverged(progress["skipped"], recipe.meta_batch)
            logged = step % recipe.log_every == 0 or step == recipe.steps
            if logged:
                _note_throughput(folder, since, step, time.monotonic() - started, recipe)
                window = pd.DataFrame(progress["window"]).replace(math.inf, math.nan)  # of a step without an update
                deviation = float(window["grad_norm"].std(ddof=0))
                row = {"step": step, **window.mean().to_dict(), "grad_norm_deviation": deviation}
                progress["window"] = []
                if validate and (step % recipe.validate_every == 0 or step == recipe.steps):
                    row |= validate(trainer.ghn)
                progress["history"].append(row)
                values = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
                _say(f"step {step:>{len(str(recipe.steps))}}/{recipe.steps}  {values}")
            stop = sum_over_ranks(terminated(), device)  # one that stopped alone would leave the others waiting
            if (logged or stop) and is_first_rank():
                _save({**trainer.state_dict(), "progress": progress, "identity": identity}, folder)
            if logged:
                since, started = step, time.monotonic()
            if stop:
                sum_over_ranks(0, device)  # after one process has ended, torchrun ends the others: wait for the save
                _say(f"asked to stop: saved after step {step}; started again, it resumes")
                raise SystemExit(143)


def _stop_if_diverged(recent: Sequence[int], meta_batch: int) -> None:
    skipped, total = sum(recent), len(recent) * meta_batch
    if skipped > 20 and skipped > total / 50:
        raise TrainingError(
            f"{skipped} of the last {total} networks gave a loss or gradient that is not finite (limit: 1 in 50): "
            "lower train.recipe.lr or train.recipe.clip, or keep weight_norm on"
        )


def _note_throughput(folder: Path, since: int, step: int, seconds: float, recipe: Recipe) -> None:
    if is_first_rank():
        networks = (step - since) * recipe.meta_batch / seconds
        with (folder / "throughput.csv").open("a" if since else "w") as file:
            file.write("" if since else "step,networks_per_second,images_per_second\n")
            file.write(f"{step},{networks:.2f},{networks * recipe.batch_size:.2f}\n")


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


def _resume_together(trainer: MetaTrainer, folder: Path, identity: str) -> dict:
    """Progress of the last checkpoint, the same on all ranks. The first reads alone: it may set files aside."""
    progress = _resume(trainer, folder, identity) if is_first_rank() else None
    step = sum_over_ranks(progress["step"] if progress else 0, next(trainer.ghn.parameters()).device)
    progress = progress or _resume(trainer, folder, identity)
    if progress["step"] != step:
        raise TrainingError(f"a process would start after step {progress['step']}, the first after {step:.0f}: "
                            f"{folder} must be one folder that all nodes see")  # fmt: skip
    return progress


def _resume(trainer: MetaTrainer, folder: Path, identity: str) -> dict:
    start = {"step": 0, "position": 0, "skipped": [], "window": [], "history": []}
    for name in "checkpoint.pt", "checkpoint.previous.pt":
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _say(f"{folder / name} is damaged ({error}): trying the one before it")
            os.replace(folder / name, folder / "checkpoint.damaged.pt")  # or the next save would take it for good
            continue
        if state["identity"] != identity:
            _say("the checkpoint here is of another configuration or data: now checkpoint.old.pt, starting anew")
            os.replace(folder / name, folder / "checkpoint.old.pt")
            (folder / "checkpoint.previous.pt").unlink(missing_ok=True)
            return start
        trainer.load_state_dict(state)
        _say(f"resuming after step {state['progress']['step']}")
        return state["progress"]
    return start


@contextmanager
def _only_writer(folder: Path):
    try:
        with filelock.FileLock(folder / "lock", timeout=0) if is_first_rank() else nullcontext():
            yield
    except filelock.Timeout as error:
        raise TrainingError(f"another process is training in {folder}: wait for it or stop it") from error
