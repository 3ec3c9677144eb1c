"""Mutated weights, configurations and tokenizers: an encoder that works, or `BadWeights`; texts of every kind."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from fuzzing import edited_json, edits, json_values, run
from hypothesis import strategies as st

from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.formats import files, huggingface, native, openai
from clipworks.encoders.formats.keymap import give
from clipworks.encoders.loading import load
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.tokenizers.pretrained import PretrainedTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import BadWeights, ClipworksError

SMALL = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.5, dtype=torch.float16),
         "c": torch.arange(4)}  # fmt: skip
PHOTO = np.full((20, 24, 3), 90, np.uint8)


def word_piece() -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "cat", "##s", "dog", "of"]
    model = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return model.to_str()


def sentence_piece() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁photo", "▁cat", "s", "▁dog", "c", "a", "t"]
    model = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.add_special_tokens(["<pad>", "</s>"])
    model.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return model.to_str()


def saved(**options) -> bytes:
    stream = io.BytesIO()
    torch.save(SMALL, stream, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


# -- files of tensors ----------------------------------------------------------------------------------------------


def safetensors_bytes(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "backslashreplace")
    return struct.pack("<Q", len(text)) + text + data


def parts(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def safetensors_files(draw: st.DrawFn, whole: bytes) -> bytes:
    header, data = parts(whole)
    if draw(st.booleans()):
        return safetensors_bytes(draw(edited_json(header)), data)
    return safetensors_bytes(draw(edits(json.dumps(header).encode())), draw(st.just(data) | edits(data, 2)))


@st.composite
def torch_zips(draw: st.DrawFn) -> bytes:
    """A torch zip with one member changed and packed as it should be, so that it is no damage of the zip."""
    with zipfile.ZipFile(io.BytesIO(saved())) as box:
        members = {info.filename: box.read(info) for info in box.infolist()}
    changed = draw(st.sampled_from(sorted(members) + [n for n in members if n.endswith("data.pkl")] * 12))
    members[changed] = draw(edits(members[changed]))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as box:
        for name, data in members.items():
            box.writestr(name, data)
    return stream.getvalue()


safetensors_torch = pytest.importorskip("safetensors.torch")
PLAIN = safetensors_torch.save(SMALL, metadata={"x": "y"})
FILES = {
    "safetensors": edits(PLAIN),
    "safetensors headers": safetensors_files(PLAIN),
    "torch zip": edits(saved()),
    "torch zip members": torch_zips(),
    "torch legacy": edits(saved(_use_new_zipfile_serialization=False), keep=2),
    "plain pickles": json_values.map(lambda value: pickle.dumps(value, protocol=2)).flatmap(edits),
}


def read_bytes(box):
    def read(data: bytes) -> None:
        (box / "file").write_bytes(data)
        for tensor in files.read(box / "file").values.values():
            tensor.double().sum()  # every number can be reached

    return read


@pytest.mark.parametrize("name", FILES)
def test_mutants_are_tensors_or_bad_weights(box, name):
    assert run(FILES[name], read_bytes(box), 200, BadWeights)["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_mutants_are_tensors_or_bad_weights(box, name):
    assert run(FILES[name], read_bytes(box), 10_000, BadWeights)["refused"]


# -- encoders ------------------------------------------------------------------------------------------------------


class Small(dict):
    """Everything that is mutated: the parts of one tiny model in several formats, made once."""

    def __init__(self):
        encoder = toy_encoder()
        encoder.tokenizer = PretrainedTokenizer(word_piece().encode())
        written = native.write_tokenizer(encoder.tokenizer)
        record = {"version": 1, "config": encoder.config.to_dict(), "tokenizer": written}
        state = {n: t.detach().clone() for n, t in encoder.state_dict().items()}
        theirs = give(huggingface.pairs(encoder.config), state, "Hugging Face")
        text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32, "max_position_embeddings": 77, "eos_token_id": 63}  # fmt: skip
        vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                  "image_size": 16, "patch_size": 4}  # fmt: skip
        half = [0.5, 0.5, 0.5]
        super().__init__(
            record=record, state=state, small=native.shrink(state), hf=theirs,
            openai=give(openai.pairs(encoder.config), state, "OpenAI"),
            config={"model_type": "clip", "projection_dim": 8, "text_config": text, "vision_config": vision},
            preprocessor={"image_mean": half, "image_std": half, "size": {"shortest_edge": 16}, "resample": 3,
                          "crop_size": {"height": 16, "width": 16}, "do_resize": True, "rescale_factor": 1 / 255},
            tokenizer=json.loads(word_piece()),
            open_clip={"model_cfg": {
                "embed_dim": 8, "quick_gelu": True,
                "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "patch_size": 4, "head_width": 8,
                               "mlp_ratio": 2.0},
                "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1,
                             "mlp_ratio": 2.0}},
                "preprocess_cfg": {"mean": half, "std": half, "size": 16}},
        )  # fmt: skip


MODEL = Small()


def works(encoder) -> None:
    """What was loaded encodes an image and a text, or says why not."""
    assert torch.isfinite(encoder.images([PHOTO])).all()
    with torch.no_grad():
        try:
            vectors = encoder.texts(["a photo of cats"])
        except ClipworksError:  # of a tokenizer that does not belong to the model
            return
    assert torch.isfinite(vectors).all()


@st.composite
def changes(draw: st.DrawFn, values: dict[str, torch.Tensor]) -> list[tuple]:
    """What is to happen to some of the tensors: a name, and what becomes of it."""
    names = sorted(values)
    ways = st.one_of(
        st.just(("drop",)), st.just(("flat",)),
        st.tuples(st.just("rename"), st.sampled_from(names) | st.text(max_size=8)),
        st.tuples(st.just("shape"), st.lists(st.integers(0, 5), max_size=5)),
        st.tuples(st.just("type"), st.sampled_from([torch.int8, torch.int64, torch.float16, torch.bool])),
        st.tuples(st.just("numbers"), st.sampled_from([0, 1, 9])),
    )  # fmt: skip
    return draw(st.lists(st.tuples(st.sampled_from(names), ways), min_size=1, max_size=3))


def changed(values: dict[str, torch.Tensor], drawn: list[tuple]) -> dict[str, torch.Tensor]:
    """Tensors of which some are gone, have another name, shape, type or numbers."""
    made = dict(values)
    for name, (way, *more) in drawn:
        tensor = made.pop(name, None)
        if tensor is None or way == "drop":
            continue
        given = more[0] if more else None
        made[given if way == "rename" else name] = {
            "rename": lambda t, _: t, "flat": lambda t, _: t.flatten(), "type": lambda t, kind: t.to(kind),
            "shape": lambda t, shape: torch.zeros(shape, dtype=t.dtype), "numbers": torch.full_like,
        }[way](tensor, given)  # fmt: skip
    return made


def write(box, values: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    plain = {n: t.contiguous().clone() for n, t in values.items()}
    (box / "model.safetensors").write_bytes(safetensors_torch.save(plain, metadata=metadata))
    return box / "model.safetensors"


def load_native(box, state, record) -> None:
    works(load(write(box, state, {native.KEY: json.dumps(record)})))


def load_folder(box, state, **records) -> None:
    for file in box.glob("*.json"):
        file.unlink()
    for name, record in records.items():
        (box / f"{name}.json").write_text(json.dumps(record))
    write(box, state)
    works(load(box))


def load_openai(drawn) -> None:
    values = changed(MODEL["openai"], drawn)
    works(openai.load(files.Tensors(values, files.Path("x.pt"), "torchscript")))


HF = {"config": MODEL["config"], "preprocessor_config": MODEL["preprocessor"], "tokenizer": MODEL["tokenizer"]}


def hugging_face(box, record, name):
    load_folder(box, MODEL["hf"], **{**HF, name: record})


ENCODERS = {
    "our record": (edited_json(MODEL["record"]), lambda box, r: load_native(box, MODEL["state"], r)),
    "our configuration": (
        edited_json(MODEL["record"]["config"]),
        lambda box, c: load_native(box, MODEL["state"], {**MODEL["record"], "config": c}),
    ),
    "our tensors": (
        changes(MODEL["state"]), lambda box, c: load_native(box, changed(MODEL["state"], c), MODEL["record"]),
    ),
    "our eight bits": (
        changes(MODEL["small"]), lambda box, c: load_native(box, changed(MODEL["small"], c), MODEL["record"]),
    ),
    "config.json": (edited_json(MODEL["config"]), lambda box, r: hugging_face(box, r, "config")),
    "preprocessor_config.json": (
        edited_json(MODEL["preprocessor"]), lambda box, r: hugging_face(box, r, "preprocessor_config"),
    ),
    "Hugging Face's tensors": (
        changes(MODEL["hf"]), lambda box, c: load_folder(box, changed(MODEL["hf"], c), **HF),
    ),
    "open_clip_config.json": (
        edited_json(MODEL["open_clip"]), lambda box, r: load_folder(box, MODEL["openai"], open_clip_config=r),
    ),
    "OpenAI's tensors": (changes(MODEL["openai"]), lambda box, c: load_openai(c)),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_mutants_are_encoders_or_bad_weights(box, name):
    strategy, work = ENCODERS[name]
    assert run(strategy, lambda drawn: work(box, drawn), 150, BadWeights)["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_many_mutants_are_encoders_or_bad_weights(box, name):
    strategy, work = ENCODERS[name]
    assert run(strategy, lambda drawn: work(box, drawn), 3000, BadWeights)["refused"]


def test_the_unchanged_parts_load(box):
    """What is mutated above is good before: no test passes because everything is refused."""
    load_native(box, MODEL["state"], MODEL["record"])
    load_native(box, MODEL["small"], MODEL["record"])
    load_folder(box, MODEL["hf"], **HF)
    load_folder(box, MODEL["openai"], open_clip_config=MODEL["open_clip"])
    assert EncoderConfig.from_dict(copy.deepcopy(MODEL["record"]["config"])).dim == 8


# -- tokenizers ----------------------------------------------------------------------------------------------------

texts = st.text(max_size=40) | st.text(st.characters(categories=["Cs", "Cn", "Co", "Mn", "Cf", "Zs"]), max_size=20)
long_texts = st.builds(lambda text, count: text * count, texts, st.sampled_from([1, 1, 7, 300]))


def encode(tokenizer):
    def work(drawn) -> None:
        listed, context = drawn
        ids, cut = tokenizer.encode(listed, context)
        assert ids.shape[0] == len(listed)
        assert ids.shape[1] <= context
        assert 0 <= cut <= len(listed)
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        rows, owner = tokenizer.chunks(listed, context)
        assert len(rows) == len(owner)
        assert set(owner.tolist()) == set(range(len(listed)))
        for row in ids.tolist()[:1]:
            assert isinstance(tokenizer.decode(row), str)

    return work


TOKENIZERS = {
    "clip": CLIPTokenizer,
    "word piece": lambda: PretrainedTokenizer(word_piece().encode()),
    "sentence piece": lambda: PretrainedTokenizer(sentence_piece().encode(), clean="canonicalize"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text_is_ids_of_the_vocabulary(name, count):
    drawn = st.tuples(st.lists(long_texts, max_size=3), st.integers(0, 80))
    found = run(drawn, encode(TOKENIZERS[name]()), count)
    assert found["read"] > found["refused"]


FILES_OF_TOKENIZERS = {
    "bytes": edits(word_piece().encode()),
    "word piece": edited_json(json.loads(word_piece())).map(json.dumps).map(str.encode),
    "sentence piece": edited_json(json.loads(sentence_piece())).map(json.dumps).map(str.encode),
}


@pytest.mark.parametrize("name", FILES_OF_TOKENIZERS)
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_tokenizer_files_are_tokenizers_or_bad_weights(name, count):
    def work(data: bytes) -> None:
        PretrainedTokenizer(data, pad_id=0).encode(["a photo of cats", "", "東京 \U0001f408"], 16)

    found = run(FILES_OF_TOKENIZERS[name], work, count, BadWeights)
    assert found["read"]
    assert found["refused"]
