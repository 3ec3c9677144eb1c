"""Batches: order, neighbours, policies, what stops, what is reported; and shares of several processes."""

import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from made_images import encoded, photo

from clipworks.data.folder import FolderSource
from clipworks.data.item import Item
from clipworks.data.loader import available_cores, load_batches
from clipworks.encoders.config import PreprocessConfig
from clipworks.encoders.preprocess import Preprocess
from clipworks.errors import BadImage, ClipworksError, UnknownName

PREPROCESS = Preprocess(PreprocessConfig(size=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(20):
        kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        (root / f"{i:02}.{ending}").write_bytes(encoded(photo(30 + i, 24, i), kind))
    return root


def flat(batches):
    batches = list(batches)
    keys = [key for batch in batches for key in batch.keys]
    return keys, torch.cat([batch.pixels for batch in batches if len(batch)])


def named(image, key):
    """A preprocessing that needs no picture: the pixels are the number in the key."""
    return torch.full((3, 2, 2), float(key))


def numbers(count):
    return [Item(str(i), np.zeros((1, 1, 3), np.uint8)) for i in range(count)]


def decoding_threads():
    names = ("clipworks-decode", "clipworks-feed")
    return [t for t in threading.enumerate() if t.name.startswith(names) and t.is_alive()]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("batch_size", [1, 6, 20, 64])
def test_order_and_pixels_depend_on_neither_workers_nor_batch_size(folder, workers, batch_size):
    source = FolderSource(folder)
    batches = list(load_batches(source, PREPROCESS, batch_size, workers))
    assert [len(b) for b in batches] == [batch_size] * (20 // batch_size) + [20 % batch_size] * (20 % batch_size > 0)
    keys, pixels = flat(batches)
    assert keys == [item.key for item in source]
    expected = torch.stack([PREPROCESS(item.image) for item in source])
    assert torch.equal(pixels, expected)
    assert [item.key for batch in batches for item in batch.items] == keys


def test_order_holds_when_later_images_are_ready_first():
    def slow_first(image, key):
        time.sleep(0.03 if int(key) % 4 == 0 else 0)
        return named(image, key)

    keys, pixels = flat(load_batches(numbers(16), slow_first, 4, 4))
    assert keys == [str(i) for i in range(16)]
    assert pixels[:, 0, 0, 0].tolist() == list(range(16))


def _share(arguments):
    folder, rank, world = arguments
    items = islice(FolderSource(folder), rank, None, world)
    keys, pixels = flat(load_batches(items, PREPROCESS, 4, 2))
    return keys, pixels.numpy()


def test_the_shares_of_several_processes_are_the_whole(folder):
    """Every source keeps its order, so that taking every n-th item divides it: nothing twice, nothing left."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        shares = list(pool.map(_share, [(folder, rank, 3) for rank in range(3)]))
    keys, pixels = flat(load_batches(FolderSource(folder), PREPROCESS, 5))
    together = {key: row for share, rows in shares for key, row in zip(share, rows, strict=True)}
    assert sum(len(share) for share, _ in shares) == len(keys)
    assert sorted(together) == keys
    for key, row in zip(keys, pixels.numpy(), strict=True):
        assert np.array_equal(together[key], row)  # bit-equal in every process


# -- bad images --------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(folder, tmp_path):
    good = list(FolderSource(folder))
    (tmp_path / "page.jpg").write_bytes(b"<!doctype html><p>404")
    bad = {
        3: Item("page.jpg", tmp_path / "page.jpg"), 4: Item("empty", b""), 9: Item("refused", error="is a URL"),
        10: Item("cut", encoded(photo(40, 40), "JPEG")[:-300]), 15: Item("gone", tmp_path / "gone.png"),
    }  # fmt: skip
    items = []
    for i, item in enumerate(good):
        items += [bad[i], item] if i in bad else [item]
    return good, items, [item.key for item in bad.values()]


@pytest.mark.parametrize("on_error", ["skip", "report"])
@pytest.mark.parametrize("batch_size", [1, 4, 25])
def test_bad_images_leave_their_neighbours_bit_equal(mixed, on_error, batch_size):
    good, items, bad = mixed
    batches = list(load_batches(items, PREPROCESS, batch_size, 3, on_error))
    keys, pixels = flat(batches)
    assert keys == [item.key for item in good]
    assert torch.equal(pixels, torch.stack([PREPROCESS(item.image) for item in good]))
    reported = [error.key for batch in batches for error in batch.errors]
    assert reported == (bad if on_error == "report" else [])
    if on_error == "report":
        reasons = {error.key: error.reason for batch in batches for error in batch.errors}
        assert "a web page" in reasons["page.jpg"]
        assert reasons["empty"] == "is empty (0 bytes)"
        assert reasons["refused"] == "is a URL"
        assert "truncated" in reasons["cut"]
        assert reasons["gone"] == "no such file"


def test_a_batch_covers_the_same_items_whatever_is_bad(mixed):
    _, items, _ = mixed
    batches = list(load_batches(items, PREPROCESS, 5, 2, "report"))
    assert [len(b) + len(b.errors) for b in batches] == [5] * 5


def test_raise_names_the_first_bad_image(mixed):
    _, items, bad = mixed
    with pytest.raises(BadImage) as caught:
        list(load_batches(items, PREPROCESS, 50, 4))
    assert caught.value.key == bad[0]
    assert not decoding_threads()


def test_nothing_but_bad_images():
    items = [Item(str(i), b"x") for i in range(5)]
    assert list(load_batches(items, PREPROCESS, 2, 2, "skip")) == []
    batches = list(load_batches(items, PREPROCESS, 2, 2, "report"))
    assert [len(b) for b in batches] == [0, 0, 0]
    assert [error.key for b in batches for error in b.errors] == list("01234")
    assert list(load_batches([], PREPROCESS, 2)) == []


# -- stopping ----------------------------------------------------------------------------------------------------


def test_leaving_early_stops_the_threads_and_reads_little_ahead():
    taken = []

    def endless():
        i = 0
        while True:
            taken.append(i)
            yield Item(str(i), np.zeros((1, 1, 3), np.uint8))
            i += 1

    for batch in load_batches(endless(), named, 4, 3):
        time.sleep(0.05)
        assert len(batch) == 4
        break
    assert not decoding_threads()
    assert len(taken) <= 4 + 2 * 4 + 3 + 2  # a batch, the queue, and one on either side of it


def test_a_slow_caller_is_not_run_away_from():
    taken = []

    def counted():
        for item in numbers(200):
            taken.append(item.key)
            yield item

    for number, _ in enumerate(load_batches(counted(), named, 5, 2), 1):
        time.sleep(0.01)
        assert len(taken) <= 5 * number + 2 * 5 + 2 + 2


def test_a_source_that_fails_delivers_what_came_before():
    def failing():
        yield from numbers(7)
        raise OSError("the disk is gone")

    batches = load_batches(failing(), named, 3, 2)
    assert [next(batches).keys for _ in range(3)] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not decoding_threads()


def test_another_error_than_a_bad_image_is_not_swallowed():
    def broken(image, key):
        raise RuntimeError("a defect")

    for policy in ("raise", "skip", "report"):
        with pytest.raises(RuntimeError, match="a defect"):
            list(load_batches(numbers(3), broken, 2, 2, policy))
    assert not decoding_threads()


def test_arguments_are_checked_at_the_call():
    with pytest.raises(UnknownName, match=r"on_error must be one of 'raise', 'skip', 'report'.*Did you mean 'skip'"):
        load_batches([], PREPROCESS, 2, on_error="skipp")
    with pytest.raises(ClipworksError, match="batch_size"):
        load_batches([], PREPROCESS, 0)
    with pytest.raises(ClipworksError, match="workers"):
        load_batches([], PREPROCESS, 2, workers=0)
    assert 1 <= available_cores() <= 16
    assert available_cores(most=1) == 1


def test_a_decoding_thread_keeps_to_one_core_and_the_caller_has_all():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        def watched(image, key):
            seen.append(torch.get_num_threads())
            return named(image, key)

        list(load_batches(numbers(8), watched, 4, 2))
        assert seen == [1] * 8
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
