"""The training of a hypernetwork: meta-batches, log, validation, checkpoints.

Every random choice is a function of the seed and the step, so a checkpoint holds no random state: training
continues exactly from any step, and on any number of processes up to the order of sums.
"""

import json
import math
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from tqdm import tqdm

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.language import LanguageModel
from ghnlib.config import Recipe
from ghnlib.data.images import Augment, ImageSet, mix
from ghnlib.data.sequences import Sequences
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.processes import termination_noted
from ghnlib.training.checkpointing import TrainingError, only_writer, resume_together, save, say, write_history
from ghnlib.training.memory import describe, training_bytes
from ghnlib.training.ranks import is_first_rank, sum_over_ranks
from ghnlib.training.step import MetaTrainer, allow_tf32

NETWORKS_KEPT = 1024
"""Modules in memory, about 1 MiB each at the papers' scale; those of larger pools are built anew: their turn is far."""
AHEAD = 2
"""Meta-batches that are ready, or are being made, while the device computes one."""
RECENT = 1000
"""Steps over which dropped networks are counted."""
JUDGED = 100
"""Steps whose losses decide whether a training has diverged: by their median, for single networks lose 1e12 and more in
trainings that end well."""
SETTLED = 200
"""Steps after which losses say something: those of GHN-1 on digits have a median of 2.9 after 50, of 2.3 after 200."""
TIMES_GUESSING = 30
"""Networks with several exits lose as many times as much as guessing."""
HOPELESS = 1e4
"""Times guessing from which no training is waited for until its middle."""
REMEDY = "lower the recipe's lr or clip, or keep weight_norm on"
_BEFORE: WeakKeyDictionary[GHN, dict[Path, str]] = WeakKeyDictionary()
"""What hypernetworks were before their training in a folder, which changes them also where it is interrupted."""


def sample_meta_batch(
    architectures: Sequence[Architecture], recipe: Recipe, seed: int, position: int, extra: Sequence[Architecture] = ()
) -> tuple[list[Architecture], int]:
    """The next meta-batch and the position after it: a pure function of its arguments.

    Architectures, the first ``recipe.architectures``, are drawn without replacement within a pass, in a new order each
    pass. Meta-batches with too many nodes are passed over, as in the papers. Then each is one of ``extra`` instead
    with a probability of ``recipe.extra_share``. Raises TrainingError if there are too few architectures, or none of
    few enough nodes.
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
            if recipe.extra_share:
                draws = random.Random(mix(seed, 4, candidate))
                chosen = [draws.choice(extra) if draws.random() < recipe.extra_share else own for own in chosen]
            return chosen, candidate + 1
    raise TrainingError(
        f"1000 meta-batches in a row have more than max_nodes={recipe.max_nodes} nodes a network: raise the limit"
    )


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, pass_number: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, 3, pass_number))).tolist()


def meta_batches(
    architectures: Sequence[Architecture],
    recipe: Recipe,
    seed: int,
    position: int,
    prepare: Callable[[Architecture], object],
    ahead: int = 0,
    extra: Sequence[Architecture] = (),
) -> Iterator[tuple[list[Architecture], int]]:
    """What ``sample_meta_batch`` returns, one after the other from a position on. With ``ahead`` > 0 a thread samples
    so many beforehand and prepares their architectures, in the same order. Its errors are raised in their turn; it ends
    when the iterator is closed."""

    def following() -> tuple[list[Architecture], int]:
        nonlocal position
        chosen, position = sample_meta_batch(architectures, recipe, seed, position, extra)
        for architecture in chosen if ahead else ():
            prepare(architecture)
        return chosen, position

    if not ahead:
        while True:
            yield following()
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(following) for _ in range(ahead))
        try:
            while True:
                made.append(pool.submit(following))
                yield made.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def train_ghn(
    ghn: GHN,
    architectures: Sequence[Architecture | LanguageModel],
    images: ImageSet | Sequences,
    recipe: Recipe,
    folder: str | Path,
    seed: int,
    augment: Augment | None = None,
    validate: Callable[[GHN], dict[str, float]] | None = None,
    about: Mapping | None = None,
    extra: Sequence[Architecture] = (),
    log: Callable[[dict[str, float]], object] | None = None,
) -> pd.DataFrame:
    """Train a hypernetwork; started again after an interruption, it continues from its last checkpoint.

    SIGTERM ends the step in hand, writes a checkpoint and exits with status 143. The same training is one from the same
    initial weights, with the same recipe, number of networks, and images.

    Args:
        ghn: initialised hypernetwork, trained in place.
        architectures: networks to predict, hashable, with a ``graph`` and ``build``.
        images: labels (B,), or of sequences (B, T): the networks' logits then are (B, classes, T).
        folder: for ``checkpoint.pt`` (and the one before it; that of another training becomes ``checkpoint.old.pt``),
            ``history.csv`` and ``throughput.csv`` (networks and images through them a second). All nodes must see it.
        seed: decides the order of images and architectures, augmentation and dropout.
        validate: called on every rank each ``recipe.validate_every`` steps; its values join the history.
        about: what else the training is of, such as the images; with other values it starts anew.
        extra: networks of one's own, see ``own_networks``, that ``recipe.extra_share`` is drawn from.
        log: called by the first rank with each row of the history as soon as it is known, numbers by name; of steps
            that are taken again after a kill, again.

    Returns:
        One row a log interval: step, means of what ``MetaTrainer.step`` returns, deviation of the gradient norm,
        validation values.

    Raises:
        TrainingError: networks or images are missing or do not fit the hypernetwork; losses that are not finite have
            become the rule; the median loss of the last 100 steps is more than 30 times that of guessing, ln(classes),
            from half of the steps on, and 200, or 10,000 times from 200 steps after the warm-up on, or at last none is
            finite; a checkpoint cannot be written, another process trains in ``folder``, or not all ranks see it.
    """
    _check(ghn, architectures, images, recipe, extra)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    allow_tf32(recipe.tf32)
    pool = recipe.architectures or len(architectures)
    kept = len(extra) + (pool if pool <= NETWORKS_KEPT else (AHEAD + 2) * recipe.meta_batch)
    trainer = MetaTrainer(ghn, recipe, max(1, len(images) // recipe.batch_size), kept)
    if next(ghn.parameters()).device.type == "cuda":
        first, _ = sample_meta_batch(architectures, recipe, seed, 0, extra)
        say(describe(training_bytes(ghn, recipe, first, next(images.batches(1))[0])))
    given = [asdict(ghn.config), asdict(augment or Augment()), seed, about, _before(ghn, folder)]
    identity = _identity(recipe, *given, *_seen(architectures, images, extra))
    with only_writer(folder):
        progress = resume_together(trainer, folder, identity)
        _loop(trainer, architectures, extra, images, seed, augment, validate, folder, identity, progress, log)
        if is_first_rank():  # again: the last process may have been killed between checkpoint and history
            write_history(progress["history"], folder)
    return pd.DataFrame(progress["history"])


def _check(ghn: GHN, architectures: Sequence, images: ImageSet | Sequences, recipe: Recipe, extra: Sequence) -> None:
    if recipe.extra_share and not extra:
        raise TrainingError(f"extra_share={recipe.extra_share}: there are no networks to draw from, name some or set 0")
    if not (len(architectures) and len(images)):
        raise TrainingError(f"there are {len(architectures)} networks and {len(images)} images to train on: give some")
    classes = ghn.config.num_classes
    for network in (architectures[0], *extra):
        if not hasattr(network, "graph"):
            raise TrainingError(f"a {type(network).__name__} has no graph: give architectures (DeepNets, own_networks)")
        if (own := getattr(network, "num_classes", classes)) != classes:
            raise TrainingError(
                f"the hypernetwork is for {classes} classes, networks are for {own}: for_classes({own})"
            )
    if (found := len(images.classes)) > classes:
        raise TrainingError(f"images are of {found} classes, the hypernetwork is for {classes}: for_classes({found})")


def _identity(recipe: Recipe, *others: object) -> str:
    decisive = replace(recipe, log_every=1, validate_every=1)  # they change nothing but the history
    return json.dumps([asdict(decisive), *others], sort_keys=True, default=repr)


def _before(ghn: GHN, folder: Path) -> str:
    """The sum of all weights, to six digits: another processor rounds what is drawn in another way."""
    total = sum(float(value.double().sum()) for value in ghn.state_dict().values())
    return _BEFORE.setdefault(ghn, {}).setdefault(folder.resolve(), f"{total:.6g}")


def _seen(architectures: Sequence[Architecture], images: ImageSet | Sequences, extra: Sequence[Architecture]) -> list:
    """What tells networks and images from others."""
    labels = images.labels if isinstance(images, ImageSet) else images.tokens
    shapes = ([node.shape for node in network.graph.nodes] for network in (architectures[0], *extra))
    return [len(architectures), *shapes, len(images), images.classes, zlib.crc32(labels.cpu().numpy().tobytes())]


def _loop(trainer, architectures, extra, images, seed, augment, validate, folder, identity, progress, log) -> None:
    """Train from the step that ``progress`` has reached; with every line of the log it is saved."""
    recipe, device = trainer.recipe, next(trainer.ghn.parameters()).device
    batches = images.stream(recipe.batch_size, seed, progress["step"], augment)
    # On a processor a thread would take its time from the step.
    ahead = AHEAD if device.type == "cuda" else 0
    networks = meta_batches(architectures, recipe, seed, progress["position"], trainer.prepare, ahead, extra)
    hidden = None if is_first_rank() else True
    keep = lambda: save({**trainer.state_dict(), "progress": progress, "identity": identity}, folder)
    with (
        tqdm(total=recipe.steps, initial=progress["step"], disable=hidden, unit="step") as bar,
        termination_noted() as terminated,
        closing(networks),
    ):
        if is_first_rank() and not (folder / "checkpoint.pt").exists():  # from which the first steps can be taken again
            keep()
        since, started = progress["step"], time.monotonic()
        while progress["step"] < recipe.steps:
            _take_step(trainer, networks, batches, seed, progress)
            bar.update()
            step = progress["step"]
            validated = step % recipe.validate_every == 0 or step == recipe.steps
            logged = step % recipe.log_every == 0 or validated
            if logged:
                seconds = time.monotonic() - started
                _add_row(trainer, progress, validate if validated else None, log)
            stop = sum_over_ranks(terminated(), device)  # one that stopped alone would leave the others waiting
            if (logged or stop) and is_first_rank():
                keep()
            if logged:
                _note_throughput(folder, since, step, seconds, recipe)  # steps that are saved: no other is taken again
                since, started = step, time.monotonic()
            if stop:
                sum_over_ranks(0, device)  # after one process has ended, torchrun ends the others: wait for the save
                say(f"asked to stop: saved after step {step}; started again, it resumes")
                raise SystemExit(143)


def _take_step(trainer, networks, batches, seed: int, progress: dict) -> None:
    """One update, noted in ``progress``. Raises TrainingError if the losses say that the training has diverged."""
    chosen, progress["position"] = next(networks)
    found = trainer.step(chosen, *next(batches), seed=mix(seed, 2, progress["step"]))
    progress["step"] += 1
    progress["window"].append(found)
    progress["skipped"] = [*progress["skipped"], found["skipped"]][-RECENT:]
    progress["losses"] = [*progress["losses"], found["loss"]][-JUDGED:]
    recipe, classes = trainer.recipe, trainer.ghn.config.num_classes
    _stop_if_diverged(progress["skipped"], recipe.meta_batch)
    _stop_if_worse_than_guessing(progress["losses"], progress["step"], recipe, classes)


def _add_row(trainer, progress: dict, validate, log) -> None:
    """The window's means as a row of the history, with what ``validate`` (None: nothing) says; logged and printed."""
    row = {"step": progress["step"], **_means(progress["window"])} | (validate(trainer.ghn) if validate else {})
    progress["window"] = []
    progress["history"].append(row)
    if log and is_first_rank():
        log(dict(row))
    say(_in_words(row, trainer.recipe.steps))


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers of several steps, with the deviation of the gradient's norm."""
    table = pd.DataFrame(window).replace(math.inf, math.nan)  # of a step without an update
    return {**table.mean().to_dict(), "grad_norm_deviation": float(table["grad_norm"].std(ddof=0))}


def _in_words(row: Mapping[str, float], steps: int) -> str:
    untold = {"step", "grad_norm_deviation"} | ({"skipped"} if not row["skipped"] else set())
    values = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name not in untold)
    return f"step {row['step']:>{len(str(steps))}}/{steps}  {values}"


def _stop_if_diverged(recent: Sequence[int], meta_batch: int) -> None:
    skipped, total = sum(recent), len(recent) * meta_batch
    if skipped > 20 and skipped > total / 50:
        raise TrainingError(
            f"{skipped} of the last {total} networks gave a loss or gradient that is not finite (limit: 1 in 50): "
            f"{REMEDY}"
        )


def _stop_if_worse_than_guessing(losses: Sequence[float], step: int, recipe: Recipe, classes: int) -> None:
    warm = step >= max(recipe.warmup * recipe.steps + SETTLED, recipe.steps / 10)
    late = step >= max(SETTLED, recipe.steps / 2)
    limit = TIMES_GUESSING if late else HOPELESS
    middle = median(math.inf if math.isnan(loss) else loss for loss in losses)
    if len(losses) >= JUDGED and (warm or late) and middle > limit * math.log(max(2, classes)):
        raise TrainingError(
            f"the training has diverged: after {step} of {recipe.steps} steps the median loss of the last {JUDGED} is "
            f"{middle:.3g}, guessing has {math.log(classes):.3g} (limit: {limit:g} times that): {REMEDY}"
        )
    if step == recipe.steps and not any(map(math.isfinite, losses)):
        raise TrainingError(f"none of the last {len(losses)} steps has a finite loss: {REMEDY}")


def _note_throughput(folder: Path, since: int, step: int, seconds: float, recipe: Recipe) -> None:
    if is_first_rank():
        networks = (step - since) * recipe.meta_batch / seconds
        with (folder / "throughput.csv").open("a" if since else "w") as file:
            file.write("" if since else "step,networks_per_second,images_per_second\n")
            file.write(f"{step},{networks:.2f},{networks * recipe.batch_size:.2f}\n")
