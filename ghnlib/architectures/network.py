"""From a plan to a plain module (PPUDA appendix A.1). Shapes: B images of size H x W, C channels."""

import torch
from torch import Tensor, nn

from ghnlib.architectures.layers import IDENTITY, RELU, Flatten, Linear, PosEnc, conv, make_chain, norm
from ghnlib.architectures.operations import build
from ghnlib.architectures.plan import Plan, PlannedCell


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds down the network, for training: (B, C, side, side) -> (B, classes)."""

    def __init__(self, plan: Plan, after: int, track: bool, device):
        super().__init__()
        channels, side = plan.cells[after].channels, plan.sides[after]
        resized = plan.positions is not None and not plan.imagenet
        self.resize = nn.AdaptiveAvgPool2d(8) if resized else nn.Identity()
        side = 8 if resized else side
        layers = [RELU, IDENTITY, conv(channels, 128), norm(128, plan.norm), RELU, conv(128, 768, 2, 1, 0)]
        layers += [RELU] if plan.imagenet else [norm(768, plan.norm), RELU]
        self.features = make_chain(layers, track, device)
        # DARTS' overlapping windows for its two sizes; the 2x2 map that the next convolution needs for the others
        windows = {8: nn.AvgPool2d(5, 3), 7: nn.AvgPool2d(5, 2)}
        self.features[1] = windows.get(side, nn.AdaptiveAvgPool2d(2))
        self.classifier = Linear(768, plan.head[-1][2], device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.resize(x)).flatten(1))


class Cell(nn.Module):
    """A cell: two inputs (B, C, H, W) -> their states, concatenated (B, states * width, H', W').

    Operations that do not lead to the output own parameters, as in DeepNets-1M, but are never run.
    """

    def __init__(self, cell: PlannedCell, track: bool, device):
        super().__init__()
        self.plan = cell
        self.preprocess0, self.preprocess1 = (build(op.name, op.spec, track, device) for op in cell.preprocess)
        self._ops = nn.ModuleList(build(op.name, op.spec, track, device) for op in cell.ops)

    def forward(self, s0: Tensor | None, s1: Tensor | None, drop_path: float = 0.0) -> Tensor:
        first, second = self.plan.preprocess
        states = [self.preprocess0(s0) if first.live else None, self.preprocess1(s1) if second.live else None]
        for j in range(0, len(self._ops), 2):
            left, right = self._term(j, states, drop_path), self._term(j + 1, states, drop_path)
            states.append(right if left is None else left if right is None else left + right)
        output = [states[i] for i in self.plan.concat]
        if len(output) == 1:
            return output[0]
        like = next(state for state in output if state is not None)
        return torch.cat([torch.zeros_like(like) if state is None else state for state in output], 1)

    def _term(self, j: int, states: list[Tensor | None], drop_path: float) -> Tensor | None:
        op = self.plan.ops[j]
        if not op.live:
            return None
        out = self._ops[j](states[op.source])
        if drop_path and self.training and not (op.name == "skip_connect" and op.spec.stride == 1):
            keep = torch.empty(len(out), 1, 1, 1, device=out.device, dtype=out.dtype).bernoulli_(1 - drop_path)
            out = out * (keep / (1 - drop_path))
        return out


class Network(nn.Module):
    """An architecture of DeepNets-1M: (B, 3, H, W) -> logits (B, classes).

    With ``auxiliary``, training mode returns (logits, auxiliary logits), unless no operation of the output's path is
    in the cell that the auxiliary head reads. Parameter names are those of DeepNets-1M.
    ``drop_path``: probability of dropping an operation's output for an image, in training mode; may be changed later.
    """

    def __init__(
        self,
        plan: Plan,
        input_size: int,
        device=None,
        track: bool = True,
        auxiliary: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.expected_input_sz = input_size
        self.drop_path, self.runs_stem1 = drop_path, plan.uses_stem1
        for name, layers in plan.stem.items():
            self.add_module(name, make_chain(layers, track, device))
        if plan.positions:
            self.stem0 = self.stem0[0]  # the patch convolution has no container
            self.pos_enc = PosEnc(*plan.positions, device)
        self.cells = nn.ModuleList(Cell(cell, track, device) for cell in plan.cells)
        self.auxiliary_after = 2 * len(plan.cells) // 3
        self.auxiliary_head = AuxiliaryHead(plan, self.auxiliary_after, track, device) if auxiliary else None
        self.global_pooling = Flatten(plan.glob_avg)
        first, *second = (Linear(a, b, device=device) for _, a, b in plan.head)
        self.classifier = nn.Sequential(first, *((nn.ReLU(), nn.Dropout(0.5), *second) if second else ()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0, s1 = self._stem(x)
        auxiliary = None
        for k, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path) if cell.plan.live else None
            if k == self.auxiliary_after and self.auxiliary_head is not None and self.training and s1 is not None:
                auxiliary = self.auxiliary_head(s1)
        logits = self.classifier(self.global_pooling(s1))
        return logits if auxiliary is None else (logits, auxiliary)

    def _stem(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "pos_enc"):
            x = self.pos_enc(self.stem0(x))
        elif hasattr(self, "stem1"):
            x = self.stem0(x)
            return x, self.stem1(x) if self.runs_stem1 else None
        else:
            x = self.stem(x)
        return x, x
