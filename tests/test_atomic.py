"""Files that are there in full or not at all: what was there survives a failure, others may read the result."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipworks.atomic import write_atomically, write_json


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "a.json"
    assert write_json(path, {"a": "ä"}, ensure_ascii=False) == path
    assert path.read_text(encoding="utf-8") == '{\n "a": "ä"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def half(file):
        file.write_text('{"a":')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_the_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("x")
    path = write_atomically(tmp_path / "kept", lambda file: file.write_bytes(b"x"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_long_name_and_many_writers_at_once(tmp_path):
    path = tmp_path / ("n" * 200 + ".json")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_json(path, [i] * 1000), range(40)))
    found = json.loads(path.read_text())
    assert len(found) == 1000
    assert len(set(found)) == 1
    assert len(list(tmp_path.iterdir())) == 1
