"""Sequences of tokens behind the interface of ``ImageSet``: what comes next at each place is the label.

Shapes: n sequences, B of a batch, T tokens each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ghnlib.data.images import Augment, DataError, endless


@dataclass(frozen=True)
class Sequences:
    """``tokens``: int64 (n, T + 1), indices of ``classes``, the vocabulary."""

    tokens: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Of its batches."""
        return self.tokens.device

    def to(self, device: torch.device | str) -> Self:
        """The same set on the device."""
        return replace(self, tokens=self.tokens.to(device))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in order: tokens and the next ones, (B, T) each; the last batch may be smaller."""
        yield from ((part[:, :-1], part[:, 1:]) for part in self.tokens.split(batch_size))

    def stream(
        self, batch_size: int, seed: int, start: int = 0, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches without end, see ``ImageSet.stream``. ``augment`` is for images and must be None."""
        if augment:
            raise DataError(f"augment={augment} is for images: sequences have none, pass None")
        for index, _ in endless(len(self), min(batch_size, len(self)), seed, start):
            part = self.tokens[index.to(self.device)]
            yield part[:, :-1], part[:, 1:]


ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """0 to 999,999 in English: "one thousand two hundred thirty-four"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    return f"{in_words(number // size)} {name}" + (f" {in_words(number % size)}" if number % size else "")


def numbers_in_words(n: int, length: int, seed: int) -> Sequences:
    """n sequences of ``length`` characters and the one after, cut from random numbers up to 999,999 in words: a text
    with a grammar, of any size, that needs no file.
    """
    classes = tuple(sorted({*"".join([*ONES, *TENS, "hundredthousand"]), *" -,"}))
    drawn, text = np.random.default_rng(seed), ""
    while len(text) < n * (length + 1):
        text += ", ".join(in_words(number) for number in drawn.integers(10**6, size=n).tolist()) + ", "
    codes = torch.tensor([classes.index(character) for character in text[: n * (length + 1)]])
    return Sequences(codes.view(n, length + 1), classes)
