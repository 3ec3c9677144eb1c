"""`Encoder`: images and texts in every form, batches, long texts, fingerprint, gradients."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import tiny_towers as tiny
import torch
from PIL import Image
from torch import nn

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.layers import swap
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.errors import BadImage, ClipworksError

LONG = "a photo of a very small dog beside a very large cat on the roof of a house in the rain"


def make(context=16, **text):
    vision = VisionConfig(**tiny.VISION)
    text = TextConfig(context_length=context, width=24, layers=2, heads=2, mlp_width=40, **text)
    made = Encoder(EncoderConfig("tiny", 16, vision, text, PreprocessConfig(size=32)), CLIPTokenizer())
    return tiny.shake(made, std=0.2).eval()


@pytest.fixture(scope="module")
def encoder():
    return make()


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (40 + 7 * i, 50 - 3 * i, 3), dtype=np.uint8) for i in range(5)]


def test_images_in_every_form_give_the_same_vectors(encoder, pictures, tmp_path):
    want = encoder.images(pictures)
    assert want.shape == (5, 16)
    assert want.dtype == torch.float32
    torch.testing.assert_close(want.norm(dim=1), torch.ones(5))
    paths, blobs, opened = [], [], []
    for i, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image.save(tmp_path / f"{i}.png")
        stream = io.BytesIO()
        image.save(stream, "PNG")
        paths.append(tmp_path / f"{i}.png")
        blobs.append(stream.getvalue())
        opened.append(image)
    pixels = torch.stack([encoder.preprocess(p) for p in pictures])
    mixed = [str(paths[0]), blobs[1], opened[2], pictures[3], paths[4]]
    for form in (paths, [str(p) for p in paths], blobs, opened, tuple(opened), pixels, mixed, iter(pictures)):
        torch.testing.assert_close(encoder.images(form), want, atol=1e-6, rtol=0)
    for form in (paths[0], str(paths[0]), blobs[0], opened[0], pictures[0], pixels[0]):
        torch.testing.assert_close(encoder.images(form), want[:1], atol=1e-6, rtol=0)
    stack = np.stack([pictures[0], pictures[0][::-1]])
    torch.testing.assert_close(encoder.images(stack), encoder.images(list(stack)), atol=1e-6, rtol=0)
    assert encoder.images([]).shape == (0, 16)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(pixels), want, atol=1e-6, rtol=0)
        raw = encoder.images(pixels, normalize=False)
        torch.testing.assert_close(raw, encoder.encode_image(pixels, normalize=False), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(5))


def test_bad_images_are_named(encoder, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(BadImage) as error:
        encoder.images([pictures[0], tmp_path / "broken.png"])
    assert error.value.key.endswith("broken.png")
    with pytest.raises(BadImage) as error:
        encoder.images([pictures[0], b"junk"])
    assert error.value.key == "1"
    with pytest.raises(ClipworksError, match="pixels must have the shape"):
        encoder.images(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ClipworksError, match="batch_size must lie in"):
        encoder.images(pictures, batch_size=0)


def test_batch_size_changes_nothing(encoder, pictures):
    want = encoder.images(pictures)
    for size in (1, 2, 5):
        torch.testing.assert_close(encoder.images(pictures, batch_size=size), want, atol=1e-6, rtol=0)
    texts = ["a", "a dog and a cat", "x y z", "one two three four five six", "b"]
    want = encoder.texts(texts)
    for size in (1, 2, 5):
        torch.testing.assert_close(encoder.texts(texts, batch_size=size), want, atol=1e-6, rtol=0)


def test_texts_are_sorted_inside_and_batches_cut_at_their_longest(encoder, monkeypatch):
    texts = ["one two three four five six", "a", "a dog and a cat", "b", "x y z"]
    rows = encoder.tokenize(texts)
    assert rows.shape == (5, 8)
    want = torch.cat(
        [encoder.encode_text(nn.functional.pad(r, (0, 8))[None], cut=False) for r in rows]
    ).detach()
    widths = []
    hook = encoder.text.blocks[0].register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    got = encoder.texts(texts, batch_size=2)
    hook.remove()
    assert widths == [3, 7, 8]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.texts("a dog and a cat"), want[2:3], atol=1e-6, rtol=0)
    assert encoder.texts([]).shape == (0, 16)


def test_long_texts_are_cut_counted_and_reported_once():
    encoder = make()
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 16 tokens") as caught:
        cut = encoder.texts([LONG, "a cat"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.texts([LONG, LONG])
        encoder.tokenize("short")
    assert encoder.truncated == 3
    ids = encoder.tokenize([LONG])
    assert ids.shape == (1, 16)
    assert ids[0, -1] == 49407
    torch.testing.assert_close(encoder.encode_text(ids).detach(), cut[:1], atol=1e-6, rtol=0)
    with pytest.raises(ClipworksError, match="longer than the 16 tokens"):
        encoder.texts(["a cat", LONG], on_long="error")
    with pytest.raises(ClipworksError, match="on_long must be one of"):
        encoder.texts(LONG, on_long="chunk_mean")


def test_the_mean_of_chunks(encoder):
    texts = ["a cat", LONG, "a dog"]
    got = encoder.texts(texts, on_long="chunk-mean")
    ids, owner = CLIPTokenizer().chunks(texts, 16)
    assert owner.tolist() == [0, 1, 1, 2]
    rows = encoder.encode_text(ids).detach()
    mean = torch.stack([rows[0], nn.functional.normalize((rows[1] + rows[2]) / 2, dim=0), rows[3]])
    torch.testing.assert_close(got, mean, atol=1e-6, rtol=0)
    raw = encoder.encode_text(ids, normalize=False).detach()
    mean = torch.stack([raw[0], (raw[1] + raw[2]) / 2, raw[3]])
    torch.testing.assert_close(
        encoder.texts(texts, on_long="chunk-mean", normalize=False), mean, atol=1e-5, rtol=1e-5
    )


def test_towers_that_read_the_last_position_get_the_whole_context():
    encoder = make(causal=False, pool="last", pad_id=0)
    ids = encoder.tokenize(["a cat", "a very small dog"])
    assert ids.shape == (2, 16)
    torch.testing.assert_close(
        encoder.texts(["a cat", "a dog"])[:1], encoder.texts("a cat"), atol=1e-6, rtol=0
    )


def test_without_a_tokenizer():
    with pytest.raises(ClipworksError, match="no tokenizer"):
        tiny.encoder().texts("a cat")


def test_features_may_be_used_where_gradients_are_computed(encoder, pictures):
    head = torch.zeros(16, 2, requires_grad=True)
    (encoder.images(pictures) @ head).sum().backward()
    (encoder.texts(["a", "b"]) @ head).sum().backward()
    (encoder.texts([LONG], on_long="chunk-mean") @ head).sum().backward()
    assert head.grad is not None


def test_forward_trains_every_parameter_but_the_bias_of_the_loss():
    encoder = tiny.encoder(dim=24, vision=tiny.SIGLIP_VISION, text=tiny.SIGLIP_TEXT, logit_bias=-10.0,
                           init_log_scale=math.log(10))  # fmt: skip
    images, texts, scale = encoder(tiny.pixels(3), tiny.tokens(pad=1))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert float(scale.detach()) == pytest.approx(10) == pytest.approx(encoder.logit_scale)
    (scale * images @ texts.T + encoder.bias).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert tiny.encoder().bias is None


def test_the_start_is_drawn_from_the_seed():
    config = tiny.encoder(shaken=False).config
    a, b, c = (Encoder(config, seed=s).state_dict() for s in (0, 0, 1))
    torch.manual_seed(3)
    d = Encoder(config, seed=0).state_dict()
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], d[n]) for n in a)
    assert not torch.equal(a["visual.blocks.0.mlp.up.weight"], c["visual.blocks.0.mlp.up.weight"])
    assert a["text.tokens.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert a["visual.blocks.1.attention.out.weight"].std() == pytest.approx(24**-0.5 * 6**-0.5, rel=0.1)
    with torch.device("meta"):
        assert Encoder(config).log_scale.is_meta


def test_the_fingerprint_knows_everything_that_decides_a_vector(encoder):
    def changed(change):
        other = copy.deepcopy(encoder)
        assert other.fingerprint == encoder.fingerprint
        change(other)
        return other.fingerprint

    def weight(e):
        with torch.no_grad():
            e.visual.blocks[0].attention.q.weight[0, 0] += 1e-6

    def replaced(e):
        e.text.norm = nn.LayerNorm(24)

    def mean(e):
        from clipworks.encoders.preprocess import Preprocess

        e.preprocess = Preprocess(PreprocessConfig(size=32, mean=(0.5, 0.5, 0.5)))

    def tokenizer(e):
        e.tokenizer = CLIPTokenizer(pad_id=7)

    def precision(e):
        e.to_precision("bf16")

    def activation(e):  # no weight tells
        swap(e.visual, "blocks.0.mlp.act", nn.ReLU())

    changes = (weight, replaced, mean, tokenizer, precision, activation)
    assert len({encoder.fingerprint, *map(changed, changes)}) == 7
    assert len(encoder.fingerprint) == 64
    assert make().fingerprint == encoder.fingerprint  # the same again from the same seeds

    other = copy.deepcopy(encoder)
    before = other.fingerprint
    other.text.positions.data = other.text.positions.data + 1
    assert other.fingerprint != before
    before = other.fingerprint
    other.text.positions.data.add_(1)  # the one kind of change that cannot be seen
    assert other.refresh() != before
    assert other.fingerprint == other.refresh()


def test_texts_in_float64_stay_float64():
    from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
    from clipworks.encoders.toy import toy_encoder

    model = toy_encoder(tokenizer=CLIPTokenizer())
    single = model.texts(["a cat", "two old dogs"])
    double = model.double().texts(["a cat", "two old dogs"])
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=0)
