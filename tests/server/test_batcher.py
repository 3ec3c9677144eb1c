"""The batcher: gathers, bounds, survives."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipworks.errors import ClipworksError
from clipworks.server.batcher import Batcher, Busy, Closed


class Gate:
    """Work that waits to be let through, and notes its batches."""

    def __init__(self):
        self.open, self.batches = threading.Event(), []
        self.entered = threading.Event()

    def __call__(self, requests):
        self.batches.append(list(requests))
        self.entered.set()
        self.open.wait(10)
        return [-request if isinstance(request, int) else request for request in requests]


def test_what_waits_goes_together_and_in_order():
    gate = Gate()
    batcher = Batcher(gate, max_batch=4, max_wait=0)
    first = batcher.submit(1)
    gate.entered.wait(10)
    rest = [batcher.submit(i) for i in range(2, 8)]
    assert batcher.waiting == 6
    gate.open.set()
    assert [future.result(10) for future in [first, *rest]] == [-i for i in range(1, 8)]
    assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]
    batcher.close(10)


def test_a_full_queue_refuses_and_says_when_to_come_again():
    gate = Gate()
    batcher = Batcher(gate, max_batch=1, max_queue=2)
    batcher.submit(0)
    gate.entered.wait(10)
    waiting = [batcher.submit(1), batcher.submit(2)]
    with pytest.raises(Busy) as error:
        batcher.submit(3)
    assert error.value.after >= 1
    gate.open.set()
    assert [future.result(10) for future in waiting] == [-1, -2]
    assert batcher.submit(3).result(10) == -3
    batcher.close(10)


def test_a_client_alone_does_not_wait():
    batcher = Batcher(lambda requests: requests, max_wait=5.0)
    start = time.monotonic()
    for i in range(20):
        assert batcher.submit(i).result(10) == i
    assert time.monotonic() - start < 5.0  # one wait alone would take as long
    batcher.close(10)


def test_clients_that_come_back_are_waited_for():
    sizes = []

    def work(requests):
        time.sleep(0.04)
        return requests

    def client(number):
        for i in range(12):
            assert batcher.submit((number, i)).result(30) == (number, i)
            time.sleep(0.004 * number)  # they do not come at the same moment

    batcher = Batcher(work, max_batch=8, max_wait=0.5, observe=lambda size, _: sizes.append(size))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    batcher.close(10)
    assert sum(sizes) == 48
    assert max(sizes) == 4
    assert len(sizes) <= 24


def test_errors_reach_the_one_who_asked_and_the_thread_lives():
    def work(requests):
        if "all" in requests:
            raise KeyError("all")
        return [ValueError(r) if r == "bad" else r for r in requests]

    batcher = Batcher(work, max_batch=1)
    with pytest.raises(ValueError, match="bad"):
        batcher.submit("bad").result(10)
    with pytest.raises(KeyError):
        batcher.submit("all").result(10)
    assert batcher.submit("good").result(10) == "good"
    batcher.close(10)


def test_a_wrong_number_of_answers_is_an_error():
    batcher = Batcher(lambda _: [], max_batch=1)
    with pytest.raises(RuntimeError, match="1 answers"):
        batcher.submit(1).result(10)
    batcher.close(10)


def test_what_nobody_waits_for_any_more_is_not_done():
    gate = Gate()
    batcher = Batcher(gate, max_batch=1)
    batcher.submit("first")
    gate.entered.wait(10)
    given_up = batcher.submit("given up")
    assert given_up.cancel()
    gate.open.set()
    batcher.close(10)
    assert gate.batches == [["first"]]


def test_closing_answers_what_waits_and_takes_no_more():
    gate = Gate()
    batcher = Batcher(gate, max_batch=2)
    futures = [batcher.submit(i) for i in range(1, 6)]
    threading.Timer(0.05, gate.open.set).start()
    batcher.close(10)
    assert [future.result(0) for future in futures] == [-1, -2, -3, -4, -5]
    with pytest.raises(Closed):
        batcher.submit(6)


def test_idle_is_called_while_there_is_nothing_to_do():
    called = threading.Event()
    batcher = Batcher(lambda requests: requests, idle=called.set)
    assert called.wait(10)
    batcher.close(10)


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_wait": -1}, {"max_queue": 0}])
def test_limits_are_checked(wrong):
    with pytest.raises(ClipworksError, match=next(iter(wrong))):
        Batcher(lambda requests: requests, **wrong)
