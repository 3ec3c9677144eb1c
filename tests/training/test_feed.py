"""Order, draws and replacement: functions of (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.data.item import Item
from clipworks.errors import BadImage, ClipworksError
from clipworks.training.feed import Feed, Order, ahead, data_digest, open_pairs, step_generator

from .toy import drawings


class Draws:
    """A recipe that records what it was given."""

    def batch(self, items, step, rng):
        for item in items:
            if item.key.startswith("bad"):
                raise BadImage(item.key, "broken")
        rows = torch.tensor([child.random() for child in rng.spawn(len(items))], dtype=torch.float64)
        return {"rows": rows, "keys": [item.key for item in items], "shared": rng.random()}


def _items(count, bad=()):
    return [Item(f"{'bad' if i in bad else 'key'}{i}", caption="x") for i in range(count)]


def test_an_epoch_sees_every_sample_once_and_epochs_differ():
    order = Order(10, 5, seed=3)
    epochs = [np.concatenate([order.rows(2 * e), order.rows(2 * e + 1)]) for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    assert Order(11, 5, seed=3).steps_per_epoch == 2


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_the_batch_of_one(parts):
    order, items = Order(24, 8, seed=1), _items(24)
    for step in (0, 2, 5):
        whole = Feed(items, order, Draws()).batch(step)
        shares = [Feed(items, order, Draws(), part, parts).batch(step) for part in range(parts)]
        assert [key for s in shares for key in s["keys"]] == whole["keys"]
        assert torch.equal(torch.cat([s["rows"] for s in shares]), whole["rows"])
        assert {s["shared"] for s in shares} == {whole["shared"]}


def test_draws_differ_by_step_sample_and_seed_and_repeat():
    first = [[c.random() for c in step_generator(seed, step).spawn(4)] for seed in (0, 1) for step in (0, 1)]
    assert len({x for row in first for x in row}) == 16
    assert [c.random() for c in step_generator(1, 1).spawn(4)] == first[3]


def test_bad_images_are_replaced_and_neighbours_untouched():
    order = Order(6, 6, seed=0)
    whole = Feed(_items(6), order, Draws()).batch(0)
    feed = Feed(_items(6, bad=(2, 3)), order, Draws(), on_error="skip")
    with pytest.warns(UserWarning, match="another sample takes its place"):
        got = feed.batch(0)
    assert feed.bad == {"bad2": "broken", "bad3": "broken"}
    expected = [{"key2": "key4", "key3": "key4"}.get(k, k) for k in whole["keys"]]
    assert got["keys"] == expected
    assert torch.equal(got["rows"], whole["rows"])
    assert Feed(_items(6, bad=(2, 3)), order, Draws(), on_error="skip", bad=feed.bad).batch(0)["keys"] == expected
    with pytest.raises(BadImage):
        Feed(_items(6, bad=(2,)), order, Draws()).batch(0)
    none = Feed(_items(3, bad=(0, 1, 2)), Order(3, 1, 0), Draws(), on_error="skip")
    with pytest.warns(UserWarning, match="its place"), pytest.raises(ClipworksError, match="none of the 3 images"):
        none.batch(0)


def test_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(lambda s: s * s, range(7))) == [s * s for s in range(7)]

    def fail(step):
        if step == 3:
            raise BadImage("k", "r")
        return step

    values = ahead(fail, range(9))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadImage):
        next(values)
    started = []
    for _ in ahead(lambda s: started.append(s), range(100)):
        break
    assert len(started) < 6


def test_what_is_refused():
    with pytest.raises(ClipworksError, match=r"batch_size must lie in \[1, 4\]"):
        Order(4, 5, 0)
    with pytest.raises(ClipworksError, match="multiple of the number of processes"):
        Feed(_items(6), Order(6, 3, 0), Draws(), 0, 2)
    with pytest.raises(ClipworksError, match="1 of 2 have none, for example 'b'"):
        open_pairs([Item("a", drawings(1)[0][0], caption="x"), Item("b", drawings(1)[0][0])])


def test_digest_follows_words_and_order():
    items = _items(3)
    assert data_digest(items) == data_digest(_items(3))
    assert data_digest(items) != data_digest(items[::-1])
    assert data_digest(items) != data_digest([Item("key0", caption="y"), *items[1:]])
