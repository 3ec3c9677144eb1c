"""Runs that are killed, crash at the worst step, meet a full disk or another writer: nothing is lost or doubled."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_store import DIM, encoder, folder, same

from clipworks.errors import CollectionError
from clipworks.store.collection import Collection
from clipworks.store.embed import embed
from clipworks.store.table import is_collection
from clipworks.store.verify import verify

HERE = Path(__file__).parent
BATCH, COMMIT = 8, 16

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and signals")


@pytest.fixture(scope="module")
def warm():
    """Send a plan to the process whose children are killed, and get what came of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, str(HERE / "killed.py")], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(**plan):
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Photos, and the collection that a run without faults makes of them."""
    place = tmp_path_factory.mktemp("uninterrupted")
    embed(folder(place / "photos", 120), place / "c", encoder=encoder(), batch_size=BATCH, commit_every=COMMIT)
    return place


def plan_of(uninterrupted, tmp_path, **more):
    place = {"photos": str(uninterrupted / "photos"), "out": str(tmp_path / "c"), "log": str(tmp_path / "log")}
    return {**place, "error": str(tmp_path / "error"), "batch": BATCH, "commit": COMMIT, **more}


def finish(uninterrupted, tmp_path):
    """A run without faults afterwards; the collection must be what it would have been, and clean."""
    embed(uninterrupted / "photos", tmp_path / "c", encoder=encoder(), batch_size=BATCH, commit_every=COMMIT)
    found, expected = Collection.open(tmp_path / "c"), Collection.open(uninterrupted / "c")
    assert same(found, expected)
    assert verify(tmp_path / "c").ok
    assert list((tmp_path / "c").rglob(".*")) == []
    snapshots = list((tmp_path / "c" / "snapshot").iterdir())
    assert len(snapshots) == 1
    assert len(list((tmp_path / "c/items.lance/data").iterdir())) <= 1 + len(expected) // COMMIT


def killings(warm, photos, tmp_path, count, kills, share, record_property):
    """Kill runs over `count` photos `kills` times, each after at most a `share` of the images is encoded.

    Returns how many images were encoded once more than needed.
    """
    plan = plan_of(photos, tmp_path, kind="killed", kills=kills, most=round(share * count), seed=0)
    found = warm(**plan)
    assert found["code"] == 0
    assert found["kills"] > kills / 2  # the others had ended
    record_property("injected", found["kills"])
    assert same(Collection.open(tmp_path / "c"), Collection.open(tmp_path / "c.whole"))
    assert verify(tmp_path / "c").ok
    encoded = Counter((tmp_path / "log").read_text().split("\n")[:-1])
    assert len(encoded) == count
    # a kill costs at most what was encoded and not committed: less than a commit, and the batch that filled it
    assert encoded.total() - count <= found["kills"] * (COMMIT + BATCH)
    return encoded.total() - count


def test_killed_at_random_moments(warm, uninterrupted, tmp_path, record_property):
    assert killings(warm, uninterrupted, tmp_path, 120, 8, 0.4, record_property) > 0  # some fell into the work


@pytest.mark.slow
def test_2000_images_killed_50_times(warm, tmp_path, record_property):
    folder(tmp_path / "photos", 2000, captions=False)
    assert killings(warm, tmp_path, tmp_path, 2000, 50, 0.05, record_property) > 0


STEPS = [
    "table made, not recorded", "rows committed, not recorded", "files on the disk, not recorded",
    "half a line of the checksums", "rows recorded", "clean-up announced", "cleaned up, not recorded",
    "clean-up recorded", "checksums written, not in place", "checksums in place", "search copy begun",
    "search copy written, not in place", "search copy in place",
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step(warm, uninterrupted, tmp_path, step):
    assert warm(**plan_of(uninterrupted, tmp_path, kind="crash", hook=step)) == {"code": 77}
    assert verify(tmp_path / "c").ok or step == "table made, not recorded"
    found = Collection.open(tmp_path / "c")  # reading does not wait for a repair
    assert set(found.keys) <= {f"a/{i:03}.png" for i in range(120)}
    finish(uninterrupted, tmp_path)


def check_full(answer, place, error):
    """A run on a full disk: either only the copy for searching did not fit, or it says what to do; all is readable."""
    assert answer["code"] in (0, 3, 4)
    if answer["code"] == 3:
        said = error.read_text()
        assert said.startswith("CollectionError: ")
        assert str(place) in said
        assert "the disk is full or a size limit is reached" in said
        assert "bytes are needed" in said
        assert "run the same command again when there is room" in said
        error.unlink()


@pytest.mark.parametrize("limit", [200, 3_000, 4_700, 5_500, 9_000, 16_000])
def test_files_that_cannot_grow(warm, uninterrupted, tmp_path, limit):
    answer = warm(**plan_of(uninterrupted, tmp_path, kind="full", limit=limit))
    check_full(answer, tmp_path / "c", tmp_path / "error")
    if limit < 7_000:
        assert answer["code"] == 3
    if is_collection(tmp_path / "c"):
        found = verify(tmp_path / "c")
        assert found.ok, found.damage
        assert len(Collection.open(tmp_path / "c")) == found.n_rows
        assert found.n_rows == 120 or found.n_rows % COMMIT == 0
    finish(uninterrupted, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    (tmp_path / "disk").mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path / "disk")]
    if sys.platform != "linux" or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("mounts a small disk, which only root may do on Linux")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_a_full_disk(warm, uninterrupted, tmp_path, small_disk):
    """The disk is filled up to some kilobytes, again and again, until all rows have found room."""
    plan = plan_of(uninterrupted, tmp_path, kind="plain") | {"out": str(small_disk / "c")}
    rows, codes = [0], []
    for free in range(4, 120, 8):
        with open(small_disk / "ballast", "wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(1024)):
                    pass
            ballast.truncate(max(0, ballast.tell() - free * 1024))
        answer = warm(**plan)
        codes.append(answer["code"])
        check_full(answer, small_disk / "c", tmp_path / "error")
        if is_collection(small_disk / "c"):
            found = verify(small_disk / "c")
            assert found.ok, found.damage
            rows.append(found.n_rows)
            assert len(Collection.open(small_disk / "c")) == found.n_rows
        if answer["code"] == 0:
            break
    assert 3 in codes
    assert rows == sorted(rows)
    (small_disk / "ballast").unlink()
    assert warm(**plan) == {"code": 0}
    assert same(Collection.open(small_disk / "c"), Collection.open(uninterrupted / "c"))
    assert verify(small_disk / "c").ok


WRITER = """
import sys, numpy as np
from clipworks.errors import CollectionError
from clipworks.store.writer import Writer
from pathlib import Path
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = refused = 0
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    try:
        with Writer(path) as writer:
            writer.append(writer.build([{"key": f"{name}{i}"}], np.ones((1, 16), np.float32)))
            done += 1
    except CollectionError as error:
        if "is being written by process" not in str(error):
            raise
        refused += 1
print(done, refused)
"""


def two_writers(tmp_path, count):
    Collection.create(tmp_path / "c", dim=DIM)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "c")]
    writers = [
        subprocess.Popen([*command, name, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [writer.communicate(timeout=600)[0].split() for writer in writers]
    assert [w.returncode for w in writers] == [0, 0]
    done, refused = np.array(answers, int).sum(0)
    assert done + refused == 2 * count
    assert refused > 0  # they did meet
    found = Collection.open(tmp_path / "c")
    assert verify(tmp_path / "c").ok
    return found.keys, done


def test_two_writers_at_once(tmp_path):
    keys, done = two_writers(tmp_path, 30)
    assert len(keys) == len(set(keys)) == done


@pytest.mark.slow
def test_two_writers_with_a_thousand_rows_each(tmp_path):
    keys, done = two_writers(tmp_path, 1000)
    assert len(keys) == len(set(keys)) == done


HOLDER = """
import sys
from pathlib import Path
from clipworks.store.lock import WriterLock
with WriterLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_second_writer_is_told_at_once_who_holds_it(tmp_path, uninterrupted):
    from clipworks.store.verify import info

    embed(uninterrupted / "photos", tmp_path / "c", encoder=encoder())
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "c")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    who = f"process {holder.pid} on {os.uname().nodename} since "
    started = time.perf_counter()
    with pytest.raises(CollectionError, match=f"is being written by {who}"):
        embed(uninterrupted / "photos", tmp_path / "c", encoder=encoder())
    assert time.perf_counter() - started < 2
    with pytest.raises(CollectionError, match=f"being written by {who}.*verify it when that is done"):
        verify(tmp_path / "c")
    assert info(tmp_path / "c")["writer"].startswith(who)
    assert len(Collection.open(tmp_path / "c")) == 120  # readers are not held up
    holder.kill()
    holder.wait()
    assert info(tmp_path / "c")["writer"] is None  # a killed writer leaves nothing to clean up
    assert embed(uninterrupted / "photos", tmp_path / "c", encoder=encoder()).n_skipped == 120
