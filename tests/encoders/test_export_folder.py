"""What an exported folder may hold: no file outside of it is read, and nothing that is not as it was exported."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipworks.encoders.loading import EXPORT, load
from clipworks.encoders.runtime import folder as folders
from clipworks.encoders.runtime import is_export, onnxruntime
from clipworks.encoders.runtime.gate import Measured
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import BadWeights

try:
    import onnx
except ImportError:
    onnx = None

needs_onnx = pytest.mark.skipif(onnx is None, reason="onnx is not installed")
FILES = ("image.xml", "image.bin", "text.xml", "text.bin")


class Session:
    """Stands for a runtime: what is given comes back as zeros."""

    def __init__(self, path, precision):
        self.path = path

    def __call__(self, x):
        return torch.zeros(len(x), 8)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A folder as `export` leaves it, for a runtime that needs no library."""
    real = folders.backend
    stand_in = SimpleNamespace(PRECISIONS=("fp32", "bf16", "int8"), SUFFIXES=(".xml", ".bin"), Session=Session)
    monkeypatch.setattr(folders, "backend", lambda name: stand_in if name == "openvino" else real(name))
    monkeypatch.setattr(folders, "version", lambda name: "0")
    box = tmp_path / "fast"
    box.mkdir()
    for name in FILES:
        (box / name).write_bytes(name.encode() * 5)
    found = Measured("openvino", "int8", "plain", low=0.99)
    folders.write_record(box, toy_encoder(tokenizer=CLIPTokenizer()), "openvino", "int8", found, same=False)
    return box


def rewrite(box, **changes):
    record = json.loads((box / EXPORT).read_text())
    (box / EXPORT).write_text(json.dumps(record | changes))


def listed(box, **files):
    return json.loads((box / EXPORT).read_text())["files"] | files


def test_it_loads_as_it_was_written(exported):
    encoder = load(exported)
    assert is_export(exported)
    assert (encoder.precision, encoder.runtime, encoder.measured["low"]) == ("int8", "openvino", 0.99)
    assert encoder.images(torch.zeros(2, 3, 16, 16), normalize=False).shape == (2, 8)
    with pytest.raises(Exception, match="device"):
        encoder.to("meta")


def test_the_fingerprint_is_decided_by_what_decides_the_vectors(exported):
    first = load(exported).fingerprint
    rewrite(exported, measured={}, versions={})
    assert load(exported).fingerprint == first
    rewrite(exported, same=True)
    assert load(exported).fingerprint == toy_encoder(tokenizer=CLIPTokenizer()).fingerprint != first
    rewrite(exported, same=False, precision="bf16")
    assert load(exported).fingerprint != first


@pytest.mark.parametrize("name", FILES)
def test_a_changed_cut_or_missing_file_is_refused(exported, name):
    path = exported / name
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:-1] + b"?", whole + b"?"):
        path.write_bytes(bad)
        with pytest.raises(BadWeights, match=name):
            load(exported)
    path.unlink()
    with pytest.raises(BadWeights, match=name):
        load(exported)


def test_no_file_outside_of_the_folder_is_read(exported):
    outside = exported.parent / "secret"
    outside.write_bytes((exported / "text.bin").read_bytes())
    (exported / "text.bin").unlink()
    os.symlink(outside, exported / "text.bin")
    with pytest.raises(BadWeights, match="no plain file of this folder"):
        load(exported)
    (exported / "text.bin").unlink()
    (exported / "text.bin").write_bytes(outside.read_bytes())
    facts = listed(exported)["text.bin"]
    for name in ("../secret", str(outside), "image.so", "sub/image.xml"):
        rewrite(exported, files=listed(exported) | {name: facts})
        with pytest.raises(BadWeights, match="no file of an export"):
            load(exported)
        rewrite(exported, files={n: f for n, f in listed(exported).items() if n in FILES})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"runtime": "shell"}, {"runtime": ["openvino"]}, {"precision": "fp16"}, {"files": {}},
        {"files": []}, {"files": {"image.xml": 3, "text.xml": 3}}, {"files": {"image.xml": {}, "text.xml": {}}},
        {"config": {"dim": 8, "x": 1}},
        {"files": {n: {"bytes": 1 << 60, "sha256": ""} for n in FILES}}, {"config": 5}, {"log_scale": None},
        {"tokenizer": {"kind": "?"}}, {"bias": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_bad_weights(exported, changes):
    rewrite(exported, **changes)
    with pytest.raises(BadWeights):
        load(exported)


def test_a_record_that_is_no_json_or_too_large(exported, monkeypatch):
    (exported / EXPORT).write_text("[" * 100_000)
    with pytest.raises(BadWeights, match="damaged"):
        load(exported)
    monkeypatch.setattr(folders, "MOST_MANIFEST", 10)
    with pytest.raises(BadWeights, match="allowed are 10"):
        load(exported)


# -- ONNX ------------------------------------------------------------------------------------------------------------


def model(tensor, nested=False, domain=""):
    """A graph that adds a tensor to its input, which may lie inside a branch of an If."""
    helper = onnx.helper
    given, out = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in ("x", "y"))
    if not nested:
        nodes, weights = [helper.make_node("Add", ["x", tensor.name], ["y"], domain=domain)], [tensor]
    else:
        result = helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [4])
        branch = helper.make_graph(
            [helper.make_node("Identity", [tensor.name], ["b"])], "branch", [], [result], [tensor]
        )
        yes = helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
        nodes = [helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
                 helper.make_node("Add", ["x", "z"], ["y"])]  # fmt: skip
        weights = [yes]
    opset = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(helper.make_graph(nodes, "g", [given], [out], weights), opset_imports=opset, ir_version=9)


def outside(**told):
    """A tensor of four numbers that says it lies in a file."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in told.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def written(box, **options):
    path = box / "image.onnx"
    path.write_bytes(model(**options).SerializeToString())
    return path


@needs_onnx
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_may_lie_beside_the_graph_and_nowhere_else(tmp_path, nested):
    box = tmp_path / "box"
    box.mkdir()
    (tmp_path / "secret").write_bytes(np.zeros(4, np.float32).tobytes())
    (box / "image.onnx.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    os.symlink(tmp_path / "secret", box / "link")
    (box / "sub").mkdir()
    (box / "sub" / "data").write_bytes(bytes(16))
    fine = written(box, tensor=outside(location="image.onnx.data", offset="0", length="16"), nested=nested)
    assert onnxruntime.check(fine) == ["image.onnx.data"]
    absolute = str(tmp_path / "secret")
    for place in ("../secret", absolute, "link", "sub/data", "sub", ".", "..", "", "absent", "..\\secret"):
        with pytest.raises(BadWeights, match="no plain file beside it"):
            onnxruntime.check(written(box, tensor=outside(location=place), nested=nested))
    os.link(tmp_path / "secret", box / "hard")
    with pytest.raises(BadWeights, match="hard link"):
        onnxruntime.check(written(box, tensor=outside(location="hard"), nested=nested))
    for offset, length in (("8", "16"), ("0", "17"), ("-4", "8"), ("0", "-1"), ("x", "1"), (" 0", "1_6"),
                           ("9" * 30, "1")):  # fmt: skip
        bad = outside(location="image.onnx.data", offset=offset, length=length)
        with pytest.raises(BadWeights, match="beyond the 16 bytes"):
            onnxruntime.check(written(box, tensor=bad, nested=nested))


@needs_onnx
@pytest.mark.parametrize("places", [("image.onnx.data", "../secret"), ("../secret", "image.onnx.data")])
def test_a_tensor_that_says_twice_where_it_lies(tmp_path, places):
    (tmp_path / "image.onnx.data").write_bytes(bytes(16))
    tensor = outside(location=places[0])
    tensor.external_data.add(key="location", value=places[1])
    with pytest.raises(BadWeights, match="twice"):
        onnxruntime.check(written(tmp_path, tensor=tensor))


@needs_onnx
@pytest.mark.parametrize("way", ["symlink", "link"])
def test_a_session_reads_nothing_from_elsewhere(tmp_path, way):
    """The file at the end of a link has just the right size, and still no number of it comes out."""
    pytest.importorskip("onnxruntime")
    box = tmp_path / "box"
    box.mkdir()
    (tmp_path / "secret").write_bytes(np.full(4, 7, np.float32).tobytes())
    getattr(os, way)(tmp_path / "secret", box / "image.onnx.data")
    written(box, tensor=outside(location="image.onnx.data", offset="0", length="16"))
    with pytest.raises(BadWeights):
        onnxruntime.Session(box / "image", "fp32")


@needs_onnx
def test_foreign_operators_size_and_what_is_no_onnx(tmp_path, monkeypatch):
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    assert onnxruntime.check(written(tmp_path, tensor=tensor)) == []
    with pytest.raises(BadWeights, match="operators of evil"):
        onnxruntime.check(written(tmp_path, tensor=tensor, domain="evil"))
    (tmp_path / "image.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(BadWeights, match="not an ONNX model"):
        onnxruntime.check(tmp_path / "image.onnx")
    monkeypatch.setattr(onnxruntime, "MOST_GRAPH", 10)
    with pytest.raises(BadWeights, match="at most 10"):
        onnxruntime.check(tmp_path / "image.onnx")


@needs_onnx
def test_a_session_computes_with_the_file_beside_it(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "image.onnx.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    written(tmp_path, tensor=outside(location="image.onnx.data", offset="0", length="16"))
    assert onnxruntime.Session(tmp_path / "image", "fp32")(torch.ones(4)).tolist() == [1, 2, 3, 4]
