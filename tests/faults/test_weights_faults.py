"""Hostile and damaged weight files: nothing is executed, nothing is written, the reason is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipworks.encoders.formats import files
from clipworks.errors import BadWeights

GOOD = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5, dtype=torch.float16)}


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that only an executed payload would create."""
    return tmp_path / "canary"


class Runs:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def torch_zip(path: Path, data_pkl: bytes, members: dict[str, bytes] | None = None, root: str = "archive") -> Path:
    with zipfile.ZipFile(path, "w") as box:
        box.writestr(f"{root}/data.pkl", data_pkl)
        for name, data in (members or {}).items():
            box.writestr(name, data)
    return path


def saved(tmp_path: Path, value: object = None) -> Path:
    path = tmp_path / "good.pt"
    torch.save(GOOD if value is None else value, path)
    return path


def assert_refused(path: Path, reason: str, canary: Path | None = None) -> None:
    with pytest.raises(BadWeights, match=reason) as caught:
        files.read(path)
    assert str(path) in str(caught.value)
    assert canary is None or not canary.exists()


def assert_read_or_refused(path: Path) -> None:
    """Whatever the bytes are: a table of tensors or `BadWeights`, no other error."""
    try:
        values = files.read(path).values
    except BadWeights:
        values = {}
    assert all(isinstance(value, torch.Tensor) for value in values.values())


def test_good_files_read_equal_to_torch(tmp_path):
    paths = [
        saved(tmp_path),
        saved(tmp_path / ".", {"state_dict": {f"module.{n}": t for n, t in GOOD.items()}, "epoch": 3}),
    ]
    legacy = tmp_path / "legacy.pt"
    torch.save(OrderedDict(GOOD), legacy, _use_new_zipfile_serialization=False)
    for path in [*paths, legacy]:
        values = files.read(path).values
        assert values.keys() == GOOD.keys()
        assert all(torch.equal(values[n], t) and values[n].dtype == t.dtype for n, t in GOOD.items())


def test_views_and_shared_storages_are_restored(tmp_path):
    base = torch.arange(24.0)
    views = {"t": base.reshape(4, 6).T, "part": base[5:9], "again": base, "none": base[:0], "strided": base[::3]}
    values = files.read(saved(tmp_path, views)).values
    assert all(torch.equal(values[n], v) for n, v in views.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_calls_the_system(tmp_path, canary, zipped):
    payload = {"weights": Runs(os.system, f"touch {canary}")}
    path = tmp_path / "evil.pt"
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "nothing was run", canary)


def test_plain_pickle(tmp_path, canary):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {canary}")))
    assert_refused(path, "nothing was run", canary)


@pytest.mark.parametrize(
    "payload",
    [
        lambda canary: Runs(eval, f"open({str(canary)!r}, 'w')"),
        lambda canary: Runs(getattr, Path, "unlink"),
        lambda canary: Runs(torch.save, {}, str(canary)),
        lambda canary: Runs(torch.jit.load, str(canary)),
        lambda canary: Runs(map, print, [1]),
        lambda canary: Runs(Runs, os.system, f"touch {canary}"),
    ],
    ids=["eval", "getattr", "torch.save", "torch.jit.load", "builtins.map", "class"],
)
def test_calls_through_allowed_types(tmp_path, canary, payload):
    """Inside an OrderedDict, a list, a tuple or as the hooks of a tensor: the same refusal."""
    evil = pickle.dumps(OrderedDict(weight=[(payload(canary),)]), protocol=2)
    assert_refused(torch_zip(tmp_path / "evil.pt", evil), "asks to (call|make)", canary)


def test_a_global_smuggled_into_allowed_calls_is_never_resolved(tmp_path, canary):
    """The hooks argument of a tensor, an ordered dictionary of pairs and a type tag all stay plain data."""

    class Names:
        def __reduce__(self):
            return OrderedDict, ([("weight", os.system)],)

    path = torch_zip(tmp_path / "names.pt", pickle.dumps(Names(), protocol=2))
    assert files.read(path).values == {}
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_refused_or_read_as_data(tmp_path, canary, protocol):
    evil = pickle.dumps({"w": Runs(os.system, f"touch {canary}")}, protocol=protocol)
    assert_refused(torch_zip(tmp_path / "evil.pt", evil), "asks to call", canary)


def test_extension_and_instance_opcodes(tmp_path, canary):
    text = f"touch {canary}".encode()
    for program in (b"(S'" + text + b"'\nios\nsystem\n.", b"(cos\nsystem\nS'" + text + b"'\no.", b"\x82\x01."):
        assert_refused(torch_zip(tmp_path / "evil.pt", program), "pickle instruction", canary)


@pytest.mark.parametrize(
    "name", ["../escape", "/absolute", "archive/../../escape", "C:\\escape", "archive\\..\\escape"]
)
def test_member_names_that_leave_the_archive(tmp_path, name):
    path = torch_zip(tmp_path / "evil.pt", pickle.dumps({}, protocol=2), {name: b"x"})
    assert_refused(path, "leaves the archive")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt"]


def test_symbolic_link_member(tmp_path):
    path = torch_zip(tmp_path / "evil.pt", pickle.dumps({}, protocol=2))
    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as box:
        box.writestr(link, "/etc/passwd")
    assert_refused(path, "is a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_members_two_roots_and_no_root(tmp_path):
    body = pickle.dumps({}, protocol=2)
    assert_refused(torch_zip(tmp_path / "a.pt", body, {"archive/data.pkl": body}), "different names")
    assert_refused(torch_zip(tmp_path / "b.pt", body, {"other/data.pkl": body}), "one data.pkl")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as box:
        box.writestr("readme.txt", "hello")
    assert_refused(tmp_path / "c.pt", r"one data\.pkl\. Found \['readme\.txt'\]")


def test_compressed_members_are_no_bombs(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as box:
        box.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert_refused(tmp_path / "bomb.pt", "is compressed")


def rebuilt(offset: object, size: object, stride: object, count: int = 6) -> bytes:
    """data.pkl of one tensor with the given claims, over a storage of six float32."""
    out = io.BytesIO()
    pickler = pickle._Pickler(out, protocol=2)  # the Python one: its memo can be used op by op
    out.write(
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    )
    out.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu")
    pickler.save(count)
    out.write(b"tQ")
    for claim in (offset, size, stride):
        pickler.save(claim)
    out.write(b"\x89ccollections\nOrderedDict\n)RtRs.")
    return out.getvalue()


def test_the_forged_tensor_reads_when_honest(tmp_path):
    path = torch_zip(tmp_path / "x.pt", rebuilt(1, (2, 2), (2, 1)), {"archive/data/0": bytes(24)})
    assert files.read(path).values["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "reason"),
    [
        (0, (7,), (1,), "reaches beyond"),
        (5, (2,), (1,), "reaches beyond"),
        (0, (2, 2), (1, 9), "reaches beyond"),
        (0, (2**40,), (0,), "reaches beyond"),
        (0, (-1,), (1,), "impossible tensor"),
        (0, (2,), (-1,), "impossible tensor"),
        (-4, (2,), (1,), "impossible tensor"),
        (0, (2,), (1, 1), "impossible tensor"),
        (0, (2.0,), (1,), "impossible tensor"),
        (0, (True,), (1,), "impossible tensor"),
        (0, (1,) * 9, (1,) * 9, "impossible tensor"),
        (0, None, (1,), "damaged"),
    ],
)
def test_tensors_that_claim_more_than_is_there(tmp_path, offset, size, stride, reason):
    path = torch_zip(tmp_path / "evil.pt", rebuilt(offset, size, stride), {"archive/data/0": bytes(24)})
    assert_refused(path, reason)


def test_missing_short_and_misnamed_storages(tmp_path):
    assert_refused(torch_zip(tmp_path / "a.pt", rebuilt(0, (1,), (1,))), "does not hold it")
    assert_refused(torch_zip(tmp_path / "b.pt", rebuilt(0, (1,), (1,)), {"archive/data/0": bytes(8)}), "should hold 6")
    path = torch_zip(tmp_path / "c.pt", rebuilt(0, (1,), (1,)).replace(b"FloatStorage", b"EvilsStorage"))
    assert_refused(path, "unknown storage")


def test_endless_nesting_is_cut(tmp_path):
    bomb: dict = {}
    for _ in range(40):
        bomb = {"a": bomb, "b": bomb}
    assert_refused(torch_zip(tmp_path / "bomb.pt", pickle.dumps(bomb, protocol=2)), "nested without end")


def test_torchscript_code_is_not_run(tmp_path, canary):
    """Code that would write a file on load and on call lies in the archive; its tensors are read all the
    same."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
            torch.save(x, name)
            return x

        def __setstate__(self, state):
            torch.save(state, str(canary))

    clean = tmp_path / "clean.pt"

    class Quiet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    torch.jit.script(Quiet()).save(str(clean))
    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(clean) as source, zipfile.ZipFile(evil, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith(".py"):
                data = f"import os\nos.system('touch {canary}')\n".encode() + data
            target.writestr(info.filename, data)
    tensors = files.read(evil)
    assert tensors.kind == "torchscript"
    assert torch.equal(tensors.values["weight"], torch.ones(3))
    assert not canary.exists()


def safetensors_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        ({}, b"", 2**60, "the header claims 1152921504606846976 bytes"),
        ({"a": entry([2], 0, 8)}, b"\0" * 8, 10_000, "the header claims 10000 bytes"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None, "'b' overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8, None, "overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"\0" * 20, None, "unnamed bytes"),
        ({"a": entry([2], 0, 8)}, b"\0" * 9, None, "1 bytes at the end belong to no tensor"),
        ({"a": entry([-2], 0, 8)}, b"\0" * 8, None, "impossible shape"),
        ({"a": entry([-2, -1], 0, 8)}, b"\0" * 8, None, "impossible shape"),
        ({"a": entry([2**62, 4], 0, 8)}, b"\0" * 8, None, "needs 73786976294838206464 bytes"),
        ({"a": entry([10**4000, 10**4000], 0, 8)}, b"\0" * 8, None, "claims more than any file"),
        ({"a": entry([True], 0, 4)}, b"\0" * 4, None, "impossible shape"),
        ({"a": entry([2], 8, 0)}, b"\0" * 8, None, "its range has -8"),
        ({"a": entry([2], -8, 0)}, b"\0" * 8, None, "impossible byte range"),
        ({"a": entry([2], 0, 8, "F31")}, b"\0" * 8, None, "unknown dtype"),
        ({"a": entry([2], 0, 8, ["F32"])}, b"\0" * 8, None, "unknown dtype"),
        ({"a": {"shape": [2]}}, b"", None, "must have dtype, shape and data_offsets"),
        ({"a": 3}, b"", None, "must have dtype, shape and data_offsets"),
        ({"__metadata__": {"x": 3}}, b"", None, "__metadata__ must map strings"),
        (b"{not json", b"", None, "header is not JSON"),
        (b'{"a":' * 50_000, b"", None, "header is not JSON"),
        (b"{\xff\xfe}", b"", None, "header is not JSON"),
    ],
)
def test_safetensors_headers(tmp_path, header, data, length, reason):
    assert_refused(safetensors_file(tmp_path / "evil.safetensors", header, data, length), reason)


def test_truncated_files(tmp_path):
    from safetensors.torch import save_file

    save_file(GOOD, tmp_path / "good.safetensors")
    for path in (tmp_path / "good.safetensors", saved(tmp_path)):
        whole = path.read_bytes()
        for keep in (0, 4, 7, 20, len(whole) // 2, len(whole) - 1):
            cut = tmp_path / f"cut{path.suffix}"
            cut.write_bytes(whole[:keep])
            assert_refused(cut, "cut short|cannot be read|neither safetensors|does not hold")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_raise_bad_weights_or_still_read(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    whole = bytearray(saved(folder).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "flipped.pt"
    path.write_bytes(whole)
    assert_read_or_refused(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory, body):
    folder = tmp_path_factory.getbasetemp()
    for name, content in (("r.safetensors", body), ("r.pt", b"\x80\x02" + body)):
        (folder / name).write_bytes(content)
        assert_read_or_refused(folder / name)
    assert_read_or_refused(torch_zip(folder / "rz.pt", body))


def test_sha256(tmp_path):
    import hashlib

    path = saved(tmp_path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.read(path, right.upper()).values.keys() == GOOD.keys()
    with pytest.raises(BadWeights, match=f"its sha256 is {right}, expected {'0' * 64}"):
        files.read(path, "0" * 64)
    with pytest.raises(BadWeights, match=r"64 hexadecimal digits\. Got 'abc'"):
        files.read(path, "abc")


def test_shards_stay_in_their_folder(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert files.read_shards(index).values.keys() == {"a", "b"}
    for bad, reason in (("../one.safetensors", "same folder"), ("three.safetensors", "missing"), (3, "same folder")):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(BadWeights, match=reason):
            files.read_shards(index)


def test_other_files_are_named(tmp_path):
    pointer = tmp_path / "model.bin"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert_refused(pointer, "pointer of git-lfs")
    page = tmp_path / "page.pt"
    page.write_bytes(b"<!DOCTYPE html><html></html>")
    assert_refused(page, "neither safetensors nor")
