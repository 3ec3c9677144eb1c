"""Classification by names against a plain numpy computation, from features, from images and from a collection."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.errors import BadImage, ClipworksError
from clipworks.store.collection import Collection
from clipworks.types import Features
from clipworks.zeroshot.classify import classify

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colors:
    """An encoder that sees the mean colour of an image and reads the colour names in a sentence."""

    dim, logit_scale, fingerprint = 3, 20.0, "colors"

    @staticmethod
    def preprocess(image, key=None):
        from clipworks.data.decode import decode

        return torch.from_numpy(np.array(decode(image, key=key).resize((4, 4)))).permute(2, 0, 1) / 255

    def images(self, pixels, **_):
        return torch.nn.functional.normalize(pixels.mean((2, 3)), dim=1)

    def texts(self, sentences):
        rows = [[float(c in s) + 1e-3 for c in COLORS] for s in sentences]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


@pytest.fixture
def photos(tmp_path):
    for i, (name, color) in enumerate(COLORS.items()):
        Image.new("RGB", (20 + i, 30), color).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    return tmp_path


def test_probabilities_are_the_softmax_of_scaled_cosines():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 3)).astype(np.float32)
    found = classify(Features(vectors), list(COLORS), encoder=Colors(), templates="a {} thing", scale=7)
    words = Colors().texts([f"a {c} thing" for c in COLORS]).double().numpy()
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    e = np.exp(7 * unit @ words.T)
    np.testing.assert_allclose(found.probabilities, e / e.sum(1, keepdims=True), atol=1e-6)
    assert found.labels == [list(COLORS)[i] for i in e.argmax(1)]


def test_the_scale_sharpens_and_does_not_reorder():
    features = Features(np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32))
    soft, sharp = (classify(features, list(COLORS), encoder=Colors(), scale=s) for s in (1, 50))
    assert soft.labels == sharp.labels
    assert (sharp.probabilities.max(1) > soft.probabilities.max(1)).all()
    huge = classify(features, list(COLORS), encoder=Colors(), scale=1e6).probabilities
    assert np.isfinite(huge).all()


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_a_folder_is_classified_and_its_bad_file_reported(photos, batch_size):
    found = classify(photos, list(COLORS), encoder=Colors(), batch_size=batch_size)
    assert dict(zip(found.keys, found.labels, strict=True)) == {f"{c}.png": c for c in COLORS}
    assert [e.key for e in found.errors] == ["empty.jpg"]
    assert not classify(photos, list(COLORS), encoder=Colors(), on_error="skip").errors
    with pytest.raises(BadImage, match=r"empty\.jpg"):
        classify(photos, list(COLORS), encoder=Colors(), on_error="raise")


def test_nothing_usable_gives_an_empty_result(photos):
    found = classify([photos / "empty.jpg"], ["a", "b"], encoder=Colors())
    assert found.probabilities.shape == (0, 2)
    assert found.as_rows() == []


def test_a_collection_gives_what_its_vectors_give(tmp_path):
    vectors = np.random.default_rng(2).normal(size=(30, 3)).astype(np.float32)
    keys = [f"{i:02}.jpg" for i in range(30)]
    labels = np.array(["even" if i % 2 == 0 else "odd" for i in range(30)])
    features = Features(vectors, keys, labels)
    made = Collection.create(tmp_path / "c", features=features, dtype="float32")
    expected = classify(features, list(COLORS), encoder=Colors())
    encoder = tiny(dim=3)
    encoder.texts, encoder.log_scale = Colors().texts, torch.nn.Parameter(torch.tensor(20.0).log())
    for source in (made, str(tmp_path / "c")):
        found = classify(source, list(COLORS), encoder=encoder)
        assert found.keys == keys
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    some = classify(made, list(COLORS), encoder=encoder, where="label = 'odd'")
    assert some.keys == keys[1::2]
    np.testing.assert_allclose(some.probabilities, expected.probabilities[1::2], atol=1e-5)


def test_another_encoder_than_the_collections_is_refused(tmp_path):
    Collection.create(tmp_path / "c", encoder=tiny(dim=4, seed=1))
    with pytest.raises(ClipworksError, match="fingerprint"):
        classify(tmp_path / "c", ["a"], encoder=tiny(dim=4, seed=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "red"}, "list of class names"),
        ({"names": ["red", "red"]}, "distinct"),
        ({"scale": -1}, "scale must lie in"),
        ({"where": "label = 1"}, "collections only"),
        ({"source": Features(np.ones((2, 5), np.float32))}, "3 columns"),
        ({"source": Features(np.ones((2, 3), np.float32), fingerprint="other")}, "encoder must be the one that made"),
        ({"source": Features(np.array([[1, 0, 0], [0, np.nan, 0]]), ["a", "b"])}, "NaN or infinity for 'b'"),
        ({"names": None}, "names must be given, or shots"),
        ({"budget": 3}, "budget must be left out"),
        ({"source": "no/such/folder"}, "source not found"),
        ({"on_error": "ignore"}, "on_error must be one of"),
    ],
)
def test_mistakes_are_named(photos, change, message):
    arguments = {"source": photos, "names": list(COLORS), "encoder": Colors(), **change}
    with pytest.raises(ClipworksError, match=message):
        classify(arguments.pop("source"), arguments.pop("names"), **arguments)


def tiny(dim, seed=0):
    from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
    from clipworks.encoders.encoder import Encoder
    from clipworks.encoders.tokenizers.bpe import CLIPTokenizer

    vision = VisionConfig(image_size=16, patch_size=8, width=8, layers=1, heads=2, mlp_width=8)
    text = TextConfig(width=8, layers=1, heads=2, mlp_width=8)
    config = EncoderConfig("tiny", dim, vision, text, PreprocessConfig(size=16))
    return Encoder(config, CLIPTokenizer(), seed=seed).eval()
