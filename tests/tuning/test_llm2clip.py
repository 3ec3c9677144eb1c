"""LLM2CLIP: the adapter and both losses in numpy, language models of three shapes, cached and online vectors, what is
learned and written; the checkable facts of the card."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clipworks
from clipworks.cli.main import main
from clipworks.data.item import Item
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.formats.build import blank
from clipworks.encoders.language import LanguageModel
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.tuning.common import only, run
from clipworks.tuning.llm2clip import LLM2CLIP, Adapter, CaptionRecipe, caption_loss, rest, text_vectors
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, SHAPES, clip_shaped, coloured, quick, vit_b16

transformers = pytest.importorskip("transformers")

SAID = "a photo of . cat dog old oak red blue in the tree sits runs it house"
WORDS = ["<unk>", "<end>", *SAID.split(), *(f"{kind}{i}" for kind in "abcxyz" for i in range(5))]
CAPTIONS = ["a cat sits. the house of a dog.", "a dog. it runs in the house.", "an old oak. a red tree."] * 4
KINDS = ("llama", "gpt2", "bert")


def language(kind="llama", seed=0, width=16):
    """A random model of 2 layers over a few words, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    shape = {"vocab_size": len(WORDS), "max_position_embeddings": 40}
    usual = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape, **usual, bos_token_id=None, eos_token_id=1),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=len(WORDS), n_positions=40, n_embd=width, n_layer=2,
                                                n_head=2, bos_token_id=None, eos_token_id=1),
        "bert": lambda: transformers.BertConfig(**shape, **usual),
    }[kind]()  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModel.from_config(config).eval(), made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in KINDS:
        found[kind] = str(tmp_path_factory.mktemp(kind))
        for part in language(kind):
            part.save_pretrained(found[kind])
    return found


def fitted(folders, kind="llama", encoder=None, texts=CAPTIONS, **settings):
    x, _ = coloured()
    options = {"language_model": folders[kind], "batch_size": 12, "lr": 1e-3, **settings}
    return quick(LLM2CLIP, encoder=encoder or clip_shaped(), **options).fit(x, texts)


# -- the adapter and the losses ----------------------------------------------------------------------------------------


def layer_norm(x, norm):
    spread = np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return (x - x.mean(-1, keepdims=True)) / spread * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def linear(x, part):
    return x @ part.weight.detach().numpy().T + part.bias.detach().numpy()


def test_the_adapter_in_numpy():
    torch.manual_seed(0)
    adapter, e = Adapter(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)
    assert len(adapter.blocks) == 4
    assert all(block[1].out_features == 12 for block in adapter.blocks)
    x = e.numpy() / np.linalg.norm(e, axis=1, keepdims=True)
    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)
    for norm, up, _, down in adapter.blocks:
        x = x + linear(gelu(linear(layer_norm(x, norm), up)), down)
    np.testing.assert_allclose(adapter(e).detach(), linear(layer_norm(x, adapter.norm), adapter.out), atol=1e-12)


def test_the_adapter_without_its_blocks_and_of_longer_vectors():
    """Card: all W_2 zero leave Linear(LN(e / |e|)); the length of e says nothing."""
    adapter, e = Adapter(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(adapter(1e3 * e), adapter(e))
    with torch.no_grad():
        for block in adapter.blocks:
            block[3].weight.zero_()
            block[3].bias.zero_()
    unit = e.numpy() / np.linalg.norm(e, axis=1, keepdims=True)
    np.testing.assert_allclose(adapter(e).detach(), linear(layer_norm(unit, adapter.norm), adapter.out), atol=1e-12)


def test_the_loss_of_captions():
    """Card: log 2 for one pair whose negative is its partner; log B for equal vectors; else by loops."""
    rng = np.random.default_rng(0)
    q, p, n = (rng.normal(size=(4, 6)) for _ in range(3))
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    expected = np.mean([
        np.log(sum(np.exp(50 * cos(q[i], c)) for c in [*p, *n])) - 50 * cos(q[i], p[i]) for i in range(4)
    ])  # fmt: skip
    assert caption_loss(*map(torch.from_numpy, (q, p, n))).item() == pytest.approx(expected)
    one = torch.randn(1, 6)
    assert caption_loss(one, one, one).item() == pytest.approx(math.log(2))
    assert caption_loss(one.expand(5, -1), one.expand(5, -1)).item() == pytest.approx(math.log(5))


# -- the language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_word_is_known_to_the_first_unless_asked_otherwise(kind):
    model = LanguageModel(*language(kind))
    ids = torch.tensor([[4, 5, 6], [4, 5, 7]])
    first = model.states(ids)[:, 0]
    assert (first[0] - first[1]).abs().max() > 1e-4
    plain = LanguageModel(*language(kind), bidirectional=False)
    assert plain.causal == (kind != "bert")
    if kind != "bert":
        first = plain.states(ids)[:, 0]
        torch.testing.assert_close(first[0], first[1])
    assert not model.causal


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_a_vector_and_batches_do_not_matter(kind):
    model = LanguageModel(*language(kind))
    ids = torch.tensor([[4, 5, 6]])
    padded = torch.tensor([[4, 5, 6, -1, -1], [9, 8, 7, 6, 5]])
    torch.testing.assert_close(model(padded)[:1], model(ids), atol=1e-5, rtol=0)
    assert model.lengths(padded).tolist() == [3, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_is_the_mean_of_the_words_states_in_transformers(kind):
    """Theirs pads with the end token and masks it; a causal model is told by its configuration to see all."""
    model, tokenizer = language(kind)
    if kind != "bert":
        pytest.importorskip("transformers.masking_utils", reason="this transformers cannot be told so")
        model.config.is_causal = False
    tokenizer.pad_token = "<end>"
    batch = tokenizer(CAPTIONS[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = (states * mask).sum(1) / mask.sum(1)
    ours = LanguageModel(*language(kind))
    ids, cut = ours.tokenizer.encode(CAPTIONS[:3], 40)
    assert cut == 0
    torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=0)
    last = [states[i, n - 1] for i, n in enumerate(batch["attention_mask"].sum(1))]
    torch.testing.assert_close(LanguageModel(*language(kind), pool="last")(ids), torch.stack(last), atol=1e-5, rtol=0)
    torch.testing.assert_close(LanguageModel(*language(kind), pool="first")(ids), states[:, 0], atol=1e-5, rtol=0)


def test_a_folder_is_the_loaded_model_and_texts_are_cut_at_what_it_reads(folders):
    one, other = LanguageModel(folders["llama"]), LanguageModel(*language("llama"))
    ids, cut = one.tokenizer.encode(["a cat " * 60], one.context_length)
    assert (ids.shape, cut, one.context_length) == ((1, 40), 1, 40)
    assert torch.equal(one(ids), other(ids))
    assert LanguageModel(folders["llama"], context_length=12).context_length == 12


def test_copies_share_what_does_not_learn():
    model = LanguageModel(*language())
    twin = copy.deepcopy(model)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[4, 5, 6]])
    before = model(ids)
    twin.add_lora(2)
    learns = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    assert len(learns) == 2 * 7 * 2
    assert all("lora_" in n for n, _ in learns)
    assert torch.equal(twin(ids), before), "additions begin at zero"
    third = copy.deepcopy(twin)
    with torch.no_grad():
        for name, parameter in third.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    assert torch.equal(twin(ids), before)
    assert not torch.allclose(third(ids), before)
    assert torch.equal(model(ids), before)


# -- the estimator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cached_vectors_are_those_of_the_moment(folders, kind):
    encoder = fitted(folders, kind).encoder_
    texts = ["a cat", "the old house of a dog in the red tree.", "it runs"]
    cached = text_vectors(encoder, texts, batch_size=2, progress=False)
    with torch.no_grad():
        rows = encoder.encode_text(vectors=cached)
    torch.testing.assert_close(encoder.texts(texts), rows, atol=1e-5, rtol=0)
    alone = torch.cat([encoder.texts(text) for text in texts])
    torch.testing.assert_close(alone, rows, atol=1e-5, rtol=0)


def test_the_result_behaves_like_an_encoder(folders):
    method, (x, _) = fitted(folders, "bert", dim=6), coloured()
    encoder = method.encoder_
    assert isinstance(encoder, Encoder)
    assert (encoder.dim, encoder.context_length) == (6, 40)
    assert encoder.texts(["a cat", "a dog"]).shape == (2, 6)
    assert encoder.images(x).shape == (12, 6)
    words = class_vectors(NAMES, encoder, templates="a photo of a {}.")
    expected = encoder.logit_scale * encoder.images(x) @ words.T
    np.testing.assert_allclose(method.logits(x), expected, atol=1e-5)
    assert encoder.texts(["a cat " * 40], on_long="chunk-mean").shape == (1, 6)
    assert len(encoder.fingerprint) == 64
    pictures = [Item(str(i), np.full((20, 20, 3), 40 * i, np.uint8)) for i in range(3)]
    found = clipworks.classify(pictures, NAMES, encoder=encoder)
    assert len(found.as_rows()) == 3
    with pytest.raises(ClipworksError, match=r"takes tokens or vectors\. Got embeddings"):
        encoder.encode_text(embeddings=torch.zeros(1, 2, 16))
    assert method.to_new(["house", "tree"]).logits(x).shape == (12, 2)


def test_the_language_model_has_no_gradient_and_the_old_projection_is_gone(folders):
    start = LLM2CLIP(language_model=folders["llama"], dim=6, encoder=clip_shaped())._shaped(clip_shaped())
    names = {name for name, _ in start.named_parameters()}
    assert start.visual.projection.weight.shape == (6, 16)
    assert not {n for n in names if n.startswith("text.") and not n.startswith(("text.model.", "text.adapter."))}
    assert start.logit_scale == pytest.approx(1 / 0.07)
    x, _ = coloured(4)
    start.requires_grad_(True)
    for parameter in start.text.model.parameters():
        parameter.requires_grad_(False)
    vectors = text_vectors(start, CAPTIONS[:2], progress=False)
    image, text = start.encode_image(x[:2]), start.encode_text(vectors=vectors)
    assert image.shape == text.shape == (2, 6)
    (image * text).sum().backward()
    assert all(p.grad is None for p in start.text.model.parameters())
    assert all(p.grad is not None for p in start.text.adapter.parameters())
    assert start.visual.stem.projection.weight.grad.abs().sum() > 0


def test_the_file_holds_no_language_model_and_needs_the_same_one(folders, tmp_path):
    encoder, (x, _) = clip_shaped(), coloured()
    method = fitted(folders, encoder=encoder, lr=1e-2)
    path = method.save(tmp_path / "a.safetensors")
    assert not [name for name in load_file(path) if name.startswith("text.model.")]
    again = LLM2CLIP.load(path, encoder=encoder)
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    for part in language(seed=1):
        part.save_pretrained(tmp_path / "other")
    method.set_params(language_model=str(tmp_path / "other"))
    method._language = ((str(tmp_path / "other"), *method._language[0][1:]), LanguageModel(*language()))
    with pytest.raises(ClipworksError, match="language_model must be the one"):
        LLM2CLIP.load(method.save(tmp_path / "b.safetensors"), encoder=encoder)


def test_the_losses_fall_far_below_chance_on_random_vectors(folders):
    """Card: a frozen random text encoder, the adapter and a new projection on synthetic pairs."""
    x, y = coloured(24)
    texts = [NAMES[i] for i in y]
    method = quick(LLM2CLIP, encoder=clip_shaped(), language_model=folders["llama"], batch_size=3, lr=5e-3, epochs=15)
    rows = [i for c in range(0, 24, 3) for i in range(c, c + 3)]
    method.fit(x[rows], [texts[i] for i in rows])
    assert method.losses_["loss"] < 0.7
    held, classes = coloured(30, seed=5)
    assert method.score(held, [NAMES[i] for i in classes]) > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_language_model_the_own_text_tower_is_the_frozen_one(shape):
    encoder, (x, y) = SHAPES[shape](), coloured()
    method = quick(LLM2CLIP, encoder=encoder, lr=1e-3).fit(x, y)
    vectors = text_vectors(method.encoder_, ["a cat", "an old oak in the house"], progress=False)
    torch.testing.assert_close(vectors, encoder.texts(["a cat", "an old oak in the house"], normalize=False),
                               atol=1e-5, rtol=0)  # fmt: skip
    assert method.encoder_.tokenizer is not None
    assert method.encoder_.context_length == encoder.context_length


def test_the_image_tower_may_stay(folders):
    encoder = clip_shaped()
    before = encoder.state_dict()
    kept = fitted(folders, encoder=encoder, vision=False, projection="kept", lr=1e-2).encoder_
    assert all(torch.equal(v, before[n]) for n, v in kept.state_dict().items() if n.startswith("visual."))
    new = fitted(folders, encoder=encoder, vision=False, lr=1e-2).encoder_
    moved = {n for n, v in new.state_dict().items() if n.startswith("visual.") and not torch.equal(v, before[n])}
    assert moved == {"visual.projection.weight"}
    trained = fitted(folders, encoder=encoder, projection="kept", lr=1e-2).encoder_
    assert not torch.equal(trained.visual.blocks[0].mlp.up.weight, before["visual.blocks.0.mlp.up.weight"])
    with pytest.raises(ClipworksError, match="dim must be the encoder's"):
        fitted(folders, projection="kept", dim=5)


def test_sizes_of_vit_b_16():
    encoder = vit_b16()
    shaped = LLM2CLIP(dim=1280)
    shaped._shape(encoder)
    assert encoder.visual.projection.weight.shape == (1280, 768)
    block = 2 * 512 + (512 * 1024 + 1024) + (1024 * 512 + 512)
    found = sum(p.numel() for p in encoder.text.adapter.parameters())
    assert found == 4 * block + 2 * 512 + 512 * 1280 + 1280
    assert blank(encoder.config).dim == 1280


# -- captions ----------------------------------------------------------------------------------------------------------


def synonyms():
    """Captions of two sentences that say the same three things in other words."""
    return [f"a{i} b{j} c{k}. x{i} y{j} z{k}" for i, j, k in itertools.product(range(5), repeat=3)]


def found_by(encoder, texts):
    """Share of first sentences that find their second one."""
    one, two = (text_vectors(encoder, side, progress=False) for side in zip(
        *((t.partition(". ")[0], rest(t)) for t in texts), strict=True))  # fmt: skip
    one, two = (torch.nn.functional.normalize(v, dim=1) for v in (one, two))
    return float(((one @ two.T).argmax(1) == torch.arange(len(texts))).float().mean())


def test_the_caption_stage_teaches_captions_apart_on_held_out_ones():
    """Card: from near chance to above 90 % on held-out captions; only additions learn."""
    texts = [synonyms()[i] for i in np.random.default_rng(0).permutation(125)]
    learned, held = texts[:100], texts[100:]
    method = LLM2CLIP(language_model=LanguageModel(*language(width=64)), caption_epochs=1, encoder=clip_shaped())
    start = method._shaped(clip_shaped())
    items = [Item(str(i), torch.zeros(3, 16, 16), caption=text) for i, text in enumerate(learned)]
    before = {n: v.clone() for n, v in start.state_dict().items()}
    options = {"batch_size": 25, "lr": 5e-3, "warmup": 10, "epochs": 25, "seed": 0, "progress": False, "clip": 1.0}
    after = run(start, items, CaptionRecipe(learned), freeze=only("text.model.*lora_*"), **options).encoder
    moved = {n for n, v in after.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)
    assert found_by(start, held) < 0.3
    assert found_by(after, held) > 0.9


def test_negatives_are_other_captions_of_the_partners_kind():
    texts = synonyms()[:10]
    recipe = CaptionRecipe(texts)

    class Words:
        def tokenize(self, texts):
            return texts

    recipe.encoder = Words()
    items = [Item(str(i), None, caption=text) for i, text in enumerate(texts)]
    seen = set()
    for step in range(20):
        batch = recipe.batch(items, step, np.random.default_rng(step))
        for i, (q, p, n) in enumerate(zip(*(batch[k] for k in ("query", "positive", "negative")), strict=True)):
            assert {q, p} == {texts[i].partition(". ")[0] + ".", rest(texts[i])}
            assert n != p
            assert n[0] == p[0], "of the partner's kind"
            seen.add(q[0])
    assert seen == {"a", "x"}


def test_the_additions_of_the_caption_stage_are_written(folders, tmp_path):
    encoder, (x, _) = clip_shaped(), coloured()
    method = fitted(folders, encoder=encoder, caption_epochs=2, caption_lr=1e-2, caption_batch=6, rank=4)
    written = load_file(method.save(tmp_path / "a.safetensors"))
    mine = [n for n in written if n.startswith("text.model.")]
    assert mine
    assert all("lora_" in n for n in mine)
    np.testing.assert_array_equal(
        LLM2CLIP.load(tmp_path / "a.safetensors", encoder=encoder).logits(x), method.logits(x)
    )
    plain = fitted(folders, encoder=encoder)
    assert not torch.allclose(*(text_vectors(m.encoder_, ["a cat"], progress=False) for m in (plain, method)))


# -- errors and the shell ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"language_model": None, "caption_epochs": 1}, "caption_epochs needs a language_model"),
        ({"caption_epochs": 1, "texts": ["a cat"] * 12}, "caption_epochs needs captions of several sentences"),
        ({"language_model": "/no/such/folder"}, "language_model must be a model of transformers. Got '/no/such"),
        ({"language_model": 7}, "language_model must be a name, a folder or a loaded model"),
        ({"projection": "old"}, "projection must be one of 'new', 'kept'"),
        ({"pool": "men"}, "Did you mean 'mean'"),
    ],
)
def test_what_cannot_be_used_is_named(folders, settings, says):
    with pytest.raises(ClipworksError, match=says):
        fitted(folders, **settings)


def test_from_a_shell(folders, tmp_path, capsys):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((20, 20, 3), 90 * i + 20 * k, np.uint8)).save(tmp_path / "data" / name / f"{k}.png")
    model, out = save(clip_shaped(), tmp_path / "toy.safetensors"), tmp_path / "out.safetensors"
    options = ["--language-model", folders["bert"], "--epochs", "1", "--shots", "2", "--no-vision", "--json"]
    words = ["tune", str(tmp_path / "data"), "--method", "llm2clip", "--out", str(out), "--model", str(model)]
    code = main([*words, *options])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["language_model"], found["settings"]["vision"]) == (folders["bert"], False)
    assert LLM2CLIP.load(out, encoder=str(model)).names_ == ["cat", "dog"]


@pytest.mark.slow
def test_the_bundled_model_with_a_new_text_tower(folders):
    """Its table of known things begins anew, and a red sheet is told from a blue one after some steps."""
    sheets = {"red": (220, 30, 30), "blue": (30, 40, 220)}
    pictures = [Image.new("RGB", (40, 40), colour) for colour in sheets.values() for _ in range(4)]
    labels = [name for name in sheets for _ in range(4)]
    method = LLM2CLIP(list(sheets), language_model=folders["bert"], epochs=20, batch_size=4, lr=1e-3, vision=False)
    method.fit(pictures, labels)
    assert method.encoder_.visual.memory.values.weight.shape[0] == method.encoder_.dim
    assert method.score(pictures, labels) == 1.0
