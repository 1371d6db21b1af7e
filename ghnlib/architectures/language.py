"""Small language models like GPT-2 (Radford et al. 2019), behind the interface of ``Architecture``.

Shapes: B sequences, T <= context tokens of each, V tokens of the vocabulary, d width.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghnlib.graphs.graph import Graph


class Block(nn.Module):
    """Pre-norm causal attention, then a feed-forward network of four times the width.

    Queries, keys and values have layers of their own: as one layer, what a hypernetwork tiles makes them alike.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        normed = self.norm1(x)
        q, k, v = (layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.query, self.key, self.value))  # fmt: skip
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """Embeddings of tokens and of positions, blocks, a head that may share the table of tokens (``tied``)."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int, tied: bool = False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) integers -> logits of the next token at each place (B, V, T), as cross-entropy takes them."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


@dataclass(frozen=True)
class LanguageModel:
    """One ``GPT``, for hypernetworks that know ``primitives``."""

    vocabulary: int
    context: int
    layers: int = 2
    width: int = 32
    heads: int = 2
    tied: bool = False
    primitives: tuple[str, ...] = ("embedding", "masked_msa")

    @cached_property
    def graph(self) -> Graph:
        """The traced graph."""
        tokens = torch.zeros(1, self.context, dtype=torch.long)
        return Graph.from_module(self.build(), example=tokens, primitives=self.primitives)

    def build(self, device: str | torch.device = "meta") -> GPT:
        """As ``Architecture.build``."""
        with torch.device(device):
            return GPT(self.vocabulary, self.context, self.layers, self.width, self.heads, self.tied)
