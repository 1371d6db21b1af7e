"""One update of a hypernetwork: predict a meta-batch of networks, train the predictor through them.

The backward pass has two phases: each child network runs forward and backward alone, down to the predicted
parameters, and one backward pass through the hypernetwork follows. Peak memory is that of one child
and ``PREDICTED_TOGETHER`` predictions, not of the meta-batch, and the gradients are those of the joint backward pass.
Under torch.distributed every rank takes its share of each meta-batch, all with the same images, and gradients are
averaged (GHN-3 appendix).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.architectures.architecture import Architecture
from ghnlib.architectures.vision import build_to_run
from ghnlib.config import Recipe
from ghnlib.data.images import mix
from ghnlib.graphs.nodes import Role
from ghnlib.hypernetwork.ghn import GHN, without_autocast
from ghnlib.hypernetwork.quantising import quantised
from ghnlib.measuring.accuracy import exits_of
from ghnlib.training.ranks import share_of_rank, sum_gradients, sum_tensor

PREDICTED_TOGETHER = 4
"""Networks of a rank predicted at once: larger meta-batches are taken in parts, so that memory does not grow."""
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALING = {"init_scale": 65536.0, "growth_interval": 100}
"""Of losses in float16 (GHN-3's training)."""
LEAST_SCALE = 1024.0
"""Below it the scale of losses does not fall, whatever overflows."""
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class MetaTrainer:
    """One hypernetwork, trained in place, and its optimiser. ``steps_per_epoch``: for schedules in epochs;
    ``networks_kept``: in memory for their next turn."""

    def __init__(self, ghn: GHN, recipe: Recipe, steps_per_epoch: int, networks_kept: int = 64):
        self.ghn, self.recipe = ghn, recipe
        # Without running statistics, training mode differs from evaluation in dropout alone.
        self._network = lru_cache(networks_kept)(self._build)
        # Misaligned, a graph's states depend on all graphs read before it: they are those of the whole meta-batch.
        self._together = PREDICTED_TOGETHER if ghn.config.batching == "aligned" else recipe.meta_batch
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            ghn.parameters(), lr=recipe.lr, betas=tuple(recipe.betas), weight_decay=recipe.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.rate_factor(step, steps_per_epoch)
        )
        self.parts = {"ghn": ghn, "optimizer": self.optimizer, "schedule": self.schedule}
        scaled, device = recipe.precision == "float16", next(ghn.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scaled, **SCALING)
        if scaled:
            self.parts["scaler"] = self.scaler

    def prepare(self, architecture: Architecture) -> None:
        """Make what a step with the architecture will need of it, from any thread."""
        self._network(architecture)
        architecture.graph.distances  # noqa: B018  it is kept

    def _build(self, architecture: Architecture) -> nn.Module:
        net = build_to_run(architecture, next(self.ghn.parameters()).device).train(self.recipe.dropout)
        if self.recipe.precision == "float16":
            for node in architecture.graph.nodes:
                if node.role == Role.CLASS_WEIGHT:
                    _keep_in_float32(net.get_submodule(node.name.rpartition(".")[0]))
        return net

    def step(
        self, architectures: Sequence[Architecture], images: Tensor, labels: Tensor, seed: int
    ) -> dict[str, float]:
        """One update with m networks, images (b, 3, s, s) and labels (b,). ``seed``: of the networks' dropout.

        Returns:
            Mean loss, accuracy and norm of the predicted parameters over the networks, gradient norm before
            clipping, number of networks dropped because their loss or gradient was not finite. In float16 a scaled
            gradient that is not finite makes a step without an update instead, "overflow", and the next scale smaller.
        """
        m = len(architectures)
        mine = share_of_rank(range(m), cost=lambda i: len(architectures[i].graph))
        found, used = self._add_gradients(architectures, mine, images, labels, seed)
        if found[0] < m:  # of any rank: the step is made again without them, since their gradients are in the sum
            self.scaler.update(self.scaler.get_scale())  # as if it had not unscaled yet
            mine = [i for i, is_used in zip(mine, used) if is_used]
            found, _ = self._add_gradients(architectures, mine, images, labels, seed)
        count, loss, correct, parameter_norm, grad_norm, scale = found  # not a number if there is no network left
        overflow = count > 0 and scale > 1 and not math.isfinite(grad_norm)
        if count and math.isfinite(grad_norm):
            self.scaler.step(self.optimizer)
        if not count:  # nothing to judge the scale by
            self.scaler.update(scale)
        elif overflow and scale < 2 * LEAST_SCALE:
            self.scaler.update(LEAST_SCALE)
        else:
            self.scaler.update()
        self.schedule.step()
        skipped = m - int(count) if math.isfinite(grad_norm) or overflow else m
        means = {"loss": loss, "accuracy": 100 * correct, "parameter_norm": parameter_norm}
        means |= {"grad_norm": grad_norm, "skipped": skipped}
        return means | ({"overflow": int(overflow)} if self.scaler.is_enabled() else {})

    def _add_gradients(self, architectures, mine: Sequence[int], images, labels, seed: int) -> tuple[list, list]:
        """The hypernetwork's clipped gradient, of the networks ``mine`` of this rank and those of all others. Returns
        how many networks have finite losses and gradients, their mean loss, accuracy and norm of parameters, the
        gradient's norm, the scale of losses; and for each of ``mine`` whether it is one of them."""
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for start in range(0, len(mine), self._together):
            part = {i: architectures[i] for i in mine[start : start + self._together]}
            rows += self._add_part(part, len(architectures), images, labels, seed)
        sums = torch.stack(rows).sum(0) if rows else torch.zeros(4, device=images.device)
        sum_gradients(self.ghn.parameters())
        sum_tensor(sums)
        scale = self.scaler.scale(torch.ones_like(sums[0]))  # even where this rank has no network to scale a loss of
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.ghn.parameters(), self.recipe.clip).to(sums)
        # The one wait for the device: whatever is decided or reported comes at once.
        values = [sums[:1], sums[1:] / sums[0], norm[None], scale[None], *(row[:1] for row in rows)]
        found = torch.cat(values).tolist()
        return found[:6], found[6:]

    def _add_part(self, part: dict[int, Architecture], m: int, images, labels, seed: int) -> list[Tensor]:
        """Predict some of the m networks, run each, add its share of the gradient to the hypernetwork's. Returns for
        each 1 and what ``_run_child`` does, or zeros where loss or gradients are not finite."""
        predictions = self.ghn([architecture.graph for architecture in part.values()])
        outputs, gradients, rows = [], [], []
        for (i, architecture), prediction in zip(part.items(), predictions):
            found, own = self._run_child(architecture, prediction, images, labels, mix(seed, i))
            row = torch.cat([torch.ones_like(found[:1]), found])
            if any(gradient is None for gradient in own):  # a parameter that is not used: an error of the network
                rows.append(torch.zeros_like(row))
                continue
            own = torch._foreach_div(own, m)
            # Of scaled gradients the scaler must see those that are not finite.
            norms = [] if self.scaler.is_enabled() else torch._foreach_norm(own)
            rows.append(row.masked_fill(~torch.stack([*found, *norms]).isfinite().all(), 0))
            outputs += prediction.values()
            gradients += own
        if outputs:
            torch.autograd.backward(outputs, gradients)
        return rows

    def _run_child(self, architecture, parameters: dict[str, Tensor], images, labels, seed: int) -> tuple:
        """Loss (sum over exits), share of images classified correctly (by the last exit) and norm of parameters (3,),
        and the parameters' gradients; None of those that are not used."""
        net = self._network(architecture)
        torch.manual_seed(seed)
        used = quantised(parameters, self.recipe.bits) if self.recipe.bits else parameters
        autocast = AUTOCAST.get(self.recipe.precision)
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            exits = [logits.float() for logits in exits_of(torch.func.functional_call(net, used, (images,)))]
        loss = sum(F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing) for logits in exits)
        values, gamma = list(parameters.values()), self.recipe.gamma
        # It stops at the parameters, without copies of them as leaves.
        gradients = torch.autograd.grad(self.scaler.scale(loss), values, allow_unused=True, materialize_grads=gamma > 0)
        with torch.no_grad():
            norms = torch._foreach_norm(values)
            if gamma:
                slopes = self._penalty_slopes(values, norms)
                if self.scaler.is_enabled():
                    slopes = torch._foreach_mul(slopes, self.scaler.scale(torch.ones_like(norms[0])))
                gradients = torch._foreach_add(gradients, slopes, alpha=gamma)
            correct = (exits[-1].argmax(1) == labels).float().mean()
            return torch.stack([loss.detach(), correct, torch.stack(norms).sum()]), gradients

    def _penalty_slopes(self, values: Sequence[Tensor], norms: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradient of the penalty without its weight. It is written down because autograd takes a third of all
        operations of a step for it."""
        if self.recipe.penalty == "squared":
            return torch._foreach_mul(values, 2.0)
        return torch._foreach_div(values, torch._foreach_clamp_min(norms, torch.finfo(norms[0].dtype).tiny))

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on GPUs may be rounded, see ``Recipe.tf32``; of the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _keep_in_float32(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = without_autocast()(lambda x: forward(x.float()))
