"""Sequences of tokens: what they hold, batches, that a stream continues anywhere."""

from itertools import islice

import numpy as np
import pytest
import torch

from ghnlib.data.images import Augment, DataError
from ghnlib.data.sequences import in_words, numbers_in_words


@pytest.mark.parametrize(("number", "words"), [
    (0, "zero"), (13, "thirteen"), (20, "twenty"), (99, "ninety-nine"), (100, "one hundred"),
    (215, "two hundred fifteen"), (1000, "one thousand"), (70_042, "seventy thousand forty-two"),
    (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
])  # fmt: skip
def test_numbers_are_said_in_english(number, words):
    assert in_words(number) == words


def test_the_label_of_each_place_is_the_next_character():
    found = numbers_in_words(6, 20, seed=0)
    tokens, following = next(found.batches(6))
    assert tokens.shape == following.shape == (6, 20) and torch.equal(tokens[:, 1:], following[:, :-1])
    text = "".join(found.classes[i] for i in found.tokens.flatten())
    drawn = np.random.default_rng(0).integers(10**6, size=6).tolist()
    assert len(text) == 6 * 21 and ", ".join(map(in_words, drawn)).startswith(text[:100])
    assert torch.equal(found.tokens, numbers_in_words(6, 20, seed=0).tokens)
    assert not torch.equal(found.tokens, numbers_in_words(6, 20, seed=1).tokens)


def test_a_pass_has_every_sequence_once_and_a_stream_continues_anywhere():
    found = numbers_in_words(7, 9, seed=0)
    assert torch.equal(torch.cat([tokens for tokens, _ in found.batches(3)]), found.tokens[:, :-1])
    batches = list(islice(found.stream(3, seed=4), 5))
    assert [len(tokens) for tokens, _ in batches] == [3] * 5
    again = next(found.stream(3, seed=4, start=4))
    assert all(torch.equal(a, b) for a, b in zip(again, batches[4]))
    assert len({tuple(row) for tokens, _ in batches[:2] for row in tokens.tolist()}) == 6
    with pytest.raises(DataError, match="sequences have none, pass None"):
        next(found.stream(3, seed=0, augment=Augment(shift=1)))
