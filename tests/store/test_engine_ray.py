"""`embed(engine="ray")`: the collection of a plain run, to the bit; actors and the caller may be killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from small_store import encoder, folder, same

from clipworks.cli.main import main
from clipworks.errors import BadImage, ClipworksError, MissingExtra
from clipworks.store.collection import Collection
from clipworks.store.embed import embed
from clipworks.store.verify import verify
from clipworks.store.writer import Writer

HERE = Path(__file__).parent
COUNT, SIZES = 160, {"batch_size": 4, "commit_every": 16}
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or sys.platform == "win32", reason="needs ray and signals"
)


@pytest.fixture(scope="module")
def cluster():
    """Two processors of Ray, joined by every run of this file; the same threads in the plain runs."""
    import ray
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray gives its processes half a minute, which a busy machine may not
        pytest.skip(f"Ray does not start here: {error}")
    yield ray
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Pictures, two of them bad, and the collection that a plain run makes of them."""
    place = tmp_path_factory.mktemp("plain")
    folder(place / "photos", COUNT)
    (place / "photos/a/0105.jpg").write_text("<html>no image</html>")
    (place / "photos/a/0155.png").write_bytes(b"")
    report = embed(place / "photos", place / "c", encoder=encoder(), **SIZES)
    assert report.n_left_out == 2
    return place, report


def rows(path):
    """Everything in a collection but the search copy, in the order in which it was written."""
    with Writer(path) as writer:
        table = writer.rows([field.name for field in writer.table.schema])
    return table


@needs_ray
def test_the_same_collection(cluster, plain, tmp_path):
    place, expected = plain
    with warnings.catch_warnings():
        warnings.simplefilter("error", cluster.util.annotations.RayDeprecationWarning)
        report = embed(place / "photos", tmp_path / "c", encoder=encoder(), engine="ray", **SIZES)
    assert rows(tmp_path / "c").equals(rows(place / "c"))  # keys, vectors, columns, their order
    assert report.as_rows() == expected.as_rows()
    assert 0 < report.wait_share < 1
    for name in ("n_added", "n_changed", "n_left_out", "n_rows", "notes", "ignored"):
        assert getattr(report, name) == getattr(expected, name)
    assert verify(tmp_path / "c").ok
    again = embed(place / "photos", tmp_path / "c", encoder=encoder(), engine="ray", **SIZES)
    assert (again.n_added, again.n_skipped) == (0, COUNT)


@needs_ray
def test_an_address_and_one_actor_on_the_command_line(cluster, plain, tmp_path, capsys):
    place, _ = plain
    from clipworks.encoders.formats.native import save

    model = save(encoder(), tmp_path / "tiny.safetensors")
    given = ["embed", f"file://{place / 'photos'}", "--kind", "remote", "--out", str(tmp_path / "c"), "--engine", "ray",
             "--actors", "1", "--batch-size", "4", "--encoder", str(model)]  # fmt: skip
    assert main(given) == 0
    assert "160 added, 2 left out" in capsys.readouterr().out
    assert same(Collection.open(tmp_path / "c"), Collection.open(place / "c"))


@needs_ray
def test_killed_actors_lose_nothing(cluster, plain, tmp_path, monkeypatch):
    place, expected = plain
    append, killed = Writer.append, []

    def hook(writer, table):
        append(writer, table)
        if not killed:
            killed.extend(actors())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Writer, "append", hook)
    report = embed(place / "photos", tmp_path / "c", encoder=encoder(), engine="ray", **SIZES)
    assert killed
    assert report.as_rows() == expected.as_rows()
    assert rows(tmp_path / "c").equals(rows(place / "c"))


def actors():
    """Processes of the actors below this one: Ray's workers are children of a child of its driver."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            title = (place / "cmdline").read_bytes()
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
            above = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if title.startswith(b"ray::") and b"_Actor" in title and int(above) == os.getpid():
            found.append(int(place.name))
    return found


DIES = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from small_store import encoder
from clipworks.store.embed import embed
from clipworks.store.writer import Writer
torch.set_num_threads(1)
sys.modules["clipworks.store.embed"].PATIENCE = 1e9  # a busy machine would commit fewer rows at a time
append, calls = Writer.append, []
def hook(writer, table):
    append(writer, table)
    calls.append(table.num_rows)
    if len(calls) == 3:
        print(sum(calls), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
Writer.append = hook
embed(sys.argv[2], sys.argv[3], encoder=encoder(), engine="ray", batch_size=4, commit_every=16)
"""


@needs_ray
def test_a_killed_caller_keeps_what_was_committed(cluster, plain, tmp_path):
    place, _ = plain
    command = [sys.executable, "-W", "ignore", "-c", DIES, str(HERE), str(place / "photos"), str(tmp_path / "c")]
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # a Ray of its own, which dies with it
    died = subprocess.run(command, env=environment, timeout=300, check=False, stdout=subprocess.PIPE, text=True)
    assert died.returncode == -signal.SIGKILL
    assert verify(tmp_path / "c").ok
    kept = len(Collection.open(tmp_path / "c"))
    assert 48 <= kept == int(died.stdout.split()[-1]) < COUNT
    report = embed(place / "photos", tmp_path / "c", encoder=encoder(), engine="ray", **SIZES)
    assert (report.n_skipped, report.n_added) == (kept, COUNT - kept)
    assert same(Collection.open(tmp_path / "c"), Collection.open(place / "c"))


@needs_ray
def test_the_first_bad_image_can_stop_it(cluster, plain, tmp_path):
    place, _ = plain
    for name, options in (("plain", {}), ("ray", {"engine": "ray"})):
        with pytest.raises(BadImage, match="0105"):
            embed(place / "photos", tmp_path / name, encoder=encoder(), on_error="raise", **SIZES, **options)
    kept = [Collection.open(tmp_path / name) for name in ("plain", "ray")]
    assert len(kept[0]) >= 4
    assert same(*kept)


@needs_ray
def test_a_failing_source_keeps_what_was_encoded(cluster, tmp_path):
    from small_store import picture

    from clipworks.data.item import Item
    from clipworks.data.sources import Source

    class Failing(Source):
        def __iter__(self):
            yield from (Item(f"k{i}", picture(i)) for i in range(6))
            raise OSError("the share is gone")

    with pytest.raises(OSError, match="share"):
        embed(Failing("share"), tmp_path / "c", encoder=encoder(), batch_size=4, engine="ray")
    assert len(Collection.open(tmp_path / "c")) == 6


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


@needs_ray
def test_what_kills_its_actors_is_given_up_and_named(cluster, monkeypatch):
    from small_store import picture

    from clipworks.data.item import Item
    from clipworks.store import engine_ray

    monkeypatch.setattr(engine_ray, "RETRIES", 1)
    items = [*(Item(f"k{i}", picture(i)) for i in range(8)), Item("fine", picture(8)), Item("deadly", Deadly())]
    batches = iter(engine_ray.RayBatches(items, encoder(), None, batch_size=2, workers=1, actors=1))
    assert [next(batches).keys for _ in range(4)] == [[f"k{i}", f"k{i + 1}"] for i in (0, 2, 4, 6)]
    with pytest.raises(ClipworksError, match="from 'fine' to 'deadly' died 2 times"):
        next(batches)


def test_a_block_may_be_begun_so_often():
    from clipworks.store.engine_ray import _Tries

    tries = _Tries(2)
    assert [tries.begin("a") for _ in range(4)] == [0, 0, 2, 3]
    assert tries.begin("b") == 0


def test_without_ray(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clipworks\[ray\]'"):
        embed(plain[0] / "photos", tmp_path / "c", encoder=encoder(), engine="ray")
    assert not (tmp_path / "c").exists()


def test_mistakes(plain, tmp_path):
    with pytest.raises(ClipworksError, match="engine must be one of 'local', 'ray'"):
        embed(plain[0] / "photos", tmp_path / "c", encoder=encoder(), engine="dask")
    with pytest.raises(ClipworksError, match="actors is for engine='ray'"):
        embed(plain[0] / "photos", tmp_path / "c", encoder=encoder(), actors=2)
