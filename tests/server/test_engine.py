"""The engine: one pass for a batch, each request its own error, memory that fails and comes back, idle unload."""

import platform
import time

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.server.engine import Ask, Call, Engine, NoEncoder, OutOfMemory, lacks_memory
from clipworks.server.metrics import resident
from clipworks.server.shelf import Shelf
from clipworks.store.identity import encoder_of


class Counting:
    """An encoder that counts its passes and can be told to fail."""

    def __init__(self, encoder):
        self.encoder, self.passes, self.fails = encoder, [], 0
        self.preprocess, self.logit_scale = encoder.preprocess, encoder.logit_scale

    def texts(self, texts):
        self.passes.append(len(texts))
        if self.fails and (self.fails < 0 or len(texts) >= self.fails):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return self.encoder.texts(texts)

    def images(self, pixels, batch_size):
        self.passes.append(len(pixels))
        return self.encoder.images(pixels, batch_size=batch_size)


@pytest.fixture
def engine(kept):
    counting = Counting(encoder_of(kept))
    made = Engine(Shelf(kept), lambda: counting)
    made.counting = counting
    return made


def test_a_batch_is_one_pass_and_equals_single_requests(engine):
    view = engine.shelf.view()
    asks = [Ask([f"word {i % 5}"], weights=[1.0], view=view, k=3 + i) for i in range(8)]
    together = engine.work(asks)
    assert engine.counting.passes == [5]  # distinct texts
    for ask, found in zip(asks, together, strict=True):
        (alone,) = engine.work([ask])
        assert alone.rows.tolist() == found.rows.tolist()
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-6)
        assert len(found.rows) == ask.k
    assert engine.counting.passes == [5]  # recent ones are kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is free and can be asked")
def test_free_memory_is_handed_to_the_system_at_rest(engine):
    """What lies below a block that is still in use stays with the process otherwise."""
    (last,) = engine.work([Call(lambda _: [bytearray(b"x" * 2**16) for _ in range(2000)][-1])])
    before = resident()
    engine.tidy()
    assert before - resident() > 80e6
    assert len(last) == 2**16


def test_one_bad_request_spoils_no_other(engine):
    view = engine.shelf.view()
    good = Ask(["stripes"], weights=[1.0], view=view, k=2)
    bad = Ask(["same", "same"], weights=[1.0, -1.0], view=view, k=2)
    answers = engine.work([good, bad, Call(lambda e: 1 / 0), Call(lambda e: "fine")])
    assert len(answers[0].rows) == 2
    assert isinstance(answers[1], ClipworksError)
    assert isinstance(answers[2], ZeroDivisionError)
    assert answers[3] == "fine"


def test_a_batch_that_needs_too_much_memory_is_done_in_parts(engine):
    engine.counting.fails = 2
    answers = engine.work([Ask([f"part {i}"]) for i in range(4)])
    assert all(answer.vectors.shape == (1, engine.shelf.dim) for answer in answers)
    assert engine.failures == 1


def test_a_request_that_needs_too_much_memory_is_refused_and_the_next_is_served(engine):
    engine.counting.fails = -1
    (answer,) = engine.work([Ask(["too much"])])
    assert isinstance(answer, OutOfMemory)
    engine.counting.fails = 0
    (answer,) = engine.work([Ask(["too much"])])
    assert answer.vectors.shape == (1, engine.shelf.dim)


def test_allocation_failures_are_told_from_other_errors():
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert lacks_memory(error.value)
    assert lacks_memory(MemoryError())
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lacks_memory(ValueError("cannot allocate memory"))


def test_the_encoder_is_given_back_and_loaded_again(kept):
    loads = []
    engine = Engine(Shelf(kept), lambda: loads.append(1) or encoder_of(kept), idle=0.5)
    assert engine.state == "unloaded"
    (first,) = engine.work([Ask(["words"])])
    assert engine.state == "loaded"
    engine.tidy()
    assert engine.state == "loaded"
    time.sleep(0.6)
    engine.tidy()
    assert engine.state == "unloaded"
    (again,) = engine.work([Ask(["words"])])
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert (len(loads), engine.unloads) == (2, 1)


def test_without_its_encoder_vectors_are_still_ranked(kept):
    def missing():
        raise ClipworksError("/secret/place: there is no such file")

    engine = Engine(Shelf(kept), missing)
    vector = kept.vector(kept.keys[3])
    words, ranked = engine.work([
        Ask(["words"]), Ask(vectors=[vector], weights=[1.0], view=engine.shelf.view(), k=1)])  # fmt: skip
    assert isinstance(words, NoEncoder)
    assert "secret" not in str(words)
    assert ranked.rows.tolist() == [3]


def test_a_new_version_of_the_collection_is_seen(place, tmp_path, monkeypatch):
    from clipworks.server import shelf as module
    from clipworks.store.collection import Collection
    from clipworks.types import Features

    features = Features(np.eye(3, 4, dtype=np.float32), keys=["a", "b", "c"])
    collection = Collection.create(tmp_path / "grows", features=features)
    shelf = Shelf(collection.path)
    assert len(shelf.view()) == 3
    collection.add(Features(np.eye(1, 4, 3, dtype=np.float32), keys=["d"]))
    assert len(shelf.view()) == 3  # looked a moment ago
    monkeypatch.setattr(module, "LOOK", 0.0)
    assert len(shelf.view()) == 4


def test_an_empty_collection(tmp_path):
    from starlette.testclient import TestClient

    from clipworks.server.app import create_app
    from clipworks.server.service import Settings
    from clipworks.store.collection import Collection

    Collection.create(tmp_path / "empty", dim=4)
    with TestClient(create_app(tmp_path / "empty", settings=Settings(preload=False)),
                    base_url="http://localhost") as client:  # fmt: skip
        assert client.post("/search", json={}).json() == {"items": [], "total": 0, "more": False}
        assert client.post("/search", json={"text": "x"}).json() == {"items": [], "total": 0, "more": False}
        assert client.get("/map").json()["ids"] == []
        assert client.get("/collection").json()["rows"] == 0
        assert client.get("/images/" + "0" * 16).status_code == 404
        answer = client.post("/embed", json={"texts": ["x"]})
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text
