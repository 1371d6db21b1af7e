"""Meta-batches that a thread makes ready while the device computes."""

import threading
from itertools import islice

import pytest
import torch
from shared import digits, pool, tiny

from ghnlib.config import Recipe
from ghnlib.training import loop
from ghnlib.training.loop import meta_batches, train_ghn

RECIPE = Recipe(steps=6, batch_size=8, meta_batch=2, log_every=2)


def taken(count, ahead, position=0, prepare=lambda architecture: None):
    made = meta_batches(pool("train", 12), RECIPE, 0, position, prepare, ahead)
    try:
        return list(islice(made, count))
    finally:
        made.close()


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_they_are_the_same_in_the_same_order(ahead):
    expected = taken(15, 0)
    assert taken(15, ahead) == expected
    assert taken(5, ahead, expected[9][1]) == expected[10:]


def test_they_are_prepared_by_another_thread_before_their_turn():
    seen = []
    made = meta_batches(pool("train", 12), RECIPE, 0, 0, lambda a: seen.append((a, threading.current_thread())), 2)
    first, second = next(made)[0], next(made)[0]
    made.close()
    assert [a for a, _ in seen[:4]] == first + second
    assert threading.current_thread() not in {thread for _, thread in seen}
    assert all(not thread.is_alive() for _, thread in seen)
    assert len(seen) <= 2 * (2 + 2)  # no more than two meta-batches beyond those taken


def assert_ended():
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


class Broken(Exception):
    pass


def test_an_error_of_the_thread_comes_in_its_turn_and_ends_it():
    bad = taken(4, 0)[3][0][1]

    def prepare(architecture):
        if architecture is bad:
            raise Broken

    made = meta_batches(pool("train", 12), RECIPE, 0, 0, prepare, 2)
    assert [chosen for chosen, _ in islice(made, 3)] == [chosen for chosen, _ in taken(3, 0)]
    with pytest.raises(Broken):
        next(made)
    assert_ended()


@pytest.mark.parametrize("failing", [False, True])
def test_a_training_with_the_thread_is_the_one_without(tmp_path, monkeypatch, failing):
    def train(folder):
        ghn = tiny()
        train_ghn(ghn, pool("train", 12), digits().train, RECIPE, folder, 0)
        return ghn

    whole, plain, stops = train(tmp_path / "plain"), loop.meta_batches, [failing]
    monkeypatch.setattr(loop, "meta_batches", lambda *arguments: plain(*arguments[:-1], 2))
    if failing:  # interrupted within a step, then resumed
        update = loop.MetaTrainer.step

        def interrupted(self, *arguments, **options):
            if self.schedule.last_epoch == 3 and stops.pop():
                raise Broken
            return update(self, *arguments, **options)

        monkeypatch.setattr(loop.MetaTrainer, "step", interrupted)
        with pytest.raises(Broken):
            train(tmp_path / "ahead")
        stops.append(False)
    ghn = train(tmp_path / "ahead")
    torch.testing.assert_close(ghn.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert_ended()
