"""One update of a hypernetwork: predict a meta-batch of networks, train the predictor through them.

The backward pass has two phases: each child network runs forward and backward alone, with the predicted
parameters as leaves, and one backward pass through the hypernetwork follows. Peak memory is that of one child
and ``PREDICTED_TOGETHER`` predictions, not of the meta-batch, and the gradients are those of the joint backward pass.
Under torch.distributed every rank takes its share of each meta-batch, all with the same images, and gradients are
averaged (GHN-3 appendix).

Every random choice is a function of the seed and the step, so a checkpoint holds no random state: training
continues exactly from any step, and on any number of processes up to the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.config import Recipe
from ghnlib.data.images import mix
from ghnlib.hypernetwork.ghn import GHN
from ghnlib.measuring.accuracy import exits_of
from ghnlib.training.ranks import share_of_rank

PREDICTED_TOGETHER = 4
"""Networks of a rank predicted at once: larger meta-batches are taken in parts, so that memory does not grow."""
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
        loss.backward()
        norms = self._add_penalty(list(leaves.values()))
        correct = (exits[-1].detach().argmax(1) == labels).float().mean()
        return loss.item(), correct.item(), float(norms)

    @torch.no_grad()
    def _add_penalty(self, leaves: Sequence[Tensor]) -> Tensor:
        """Add the gradient of the penalty to the leaves' gradients; returns the sum of their norms. It is written down
        because autograd takes a third of all operations of a step for it."""
        norms = torch._foreach_norm(leaves)
        if self.recipe.gamma:
            for leaf in leaves:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if self.recipe.penalty == "squared":
                slopes = torch._foreach_mul(leaves, 2.0)
            else:
                slopes = torch._foreach_div(leaves, [norm.clamp_min(torch.finfo(norm.dtype).tiny) for norm in norms])
            torch._foreach_add_([leaf.grad for leaf in leaves], slopes, alpha=self.recipe.gamma)
        return torch.stack(norms).sum()

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


def _finite(leaves: Iterable[Tensor]) -> bool:
    gradients = [leaf.grad for leaf in leaves]
    return all(g is not None for g in gradients) and bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
