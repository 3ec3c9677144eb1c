"""TIP-CLIP: the loss with NULL's row, its floor, NULL itself, the score and its threshold, mining; the checkable facts
of the card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score

import clipworks
from clipworks.cli.main import main
from clipworks.data.item import Item
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce, shared_targets
from clipworks.metrics.detection import auroc
from clipworks.training.finetune import SentenceRecipe
from clipworks.tuning.tip_clip import NULL, TIPCLIP, UNSURE, NullRecipe, add_null, best_threshold, mine, mine_pages

from .toys import NAMES, SHAPES, clip_shaped, coloured, pixels, quick

ROOT = Path(__file__).parents[2]
COCO = ROOT.parent / "shared" / "data" / "coco-mini"
CAPTIONS = ["a cat on a mat", "two dogs", "an old oak", "a red barn"]
ALONE = ["nevertheless", "this was decided", "in other words", "it depends"]


def with_null(seed=0, shape="clip"):
    torch.manual_seed(seed)
    encoder = SHAPES[shape]()
    add_null(encoder)
    return encoder


def step(encoder, items):
    recipe = NullRecipe()
    recipe.bind(encoder, None)
    return recipe.forward(encoder, recipe.batch(items, 0, np.random.default_rng(0)))["infonce"]


def rows(count=4, alone=()):
    """Items with images, and without."""
    x = pixels(count)
    return [Item(str(i), x[i], caption=CAPTIONS[i]) for i in range(count)] + [
        Item(f"null-{i}", caption=text) for i, text in enumerate(alone)
    ]


def expected_loss(image, text, scale, target=None):
    """By loops; targets default to the own column."""
    logits, n = scale * image @ text.T, len(image)
    target = np.eye(n) if target is None else target
    total = 0.0
    for side in (logits, logits.T):
        for i in range(n):
            total -= (target[i] * (side[i] - np.log(np.exp(side[i]).sum()))).sum() / n / 2
    return total


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_in_numpy_with_one_row_for_all_without_a_picture():
    encoder = with_null().double()
    items = rows(3, ALONE)
    order = [0, 3, 1, 4, 5, 2, 6]
    items = [items[i] for i in order]
    null = encoder.preprocess.normalize(encoder.null.numpy()).double()
    image = encoder.images(torch.stack([null if i.image is None else i.image.double() for i in items])).numpy()
    text = encoder.texts([i.caption for i in items]).numpy()
    single = [[r.image is None for r in items].count(True) if i.image is None else 1 for i in items]
    same = np.array([[(a is b) or (a.image is None and b.image is None) for b in items] for a in items])
    with torch.no_grad():
        items = [Item(i.key, None if i.image is None else i.image.double(), caption=i.caption) for i in items]
        found = step(encoder, items).item()
    assert found == pytest.approx(expected_loss(image, text, encoder.logit_scale), rel=1e-6)
    # several right answers for the texts of NULL: as its rows are one, that is the same loss
    target = same / np.array(single)[:, None]
    assert found == pytest.approx(expected_loss(image, text, encoder.logit_scale, target), rel=1e-6)


def test_without_texts_that_have_no_picture_it_is_clips_own_loss():
    encoder = with_null()
    plain = SentenceRecipe(None, ["{}"], None)
    plain.bind(encoder, None)
    batch = plain.batch(rows(), 0, np.random.default_rng(0))
    torch.testing.assert_close(step(encoder, rows()), sum(plain.forward(encoder, batch).values()))


@pytest.mark.parametrize("alone", [1, 3, 6])
def test_the_floor_of_a_batch_of_eight(alone):
    """Card: n of N rows are NULL, all else is told apart: (n / N) log n, and 0 as a divergence from even targets."""
    place = torch.tensor([0] * alone + list(range(1, 9 - alone)))
    image = text = torch.eye(8)[place]
    floor = alone / 8 * np.log(alone)
    assert infonce(image, text, 100.0).item() == pytest.approx(floor, abs=1e-6)
    targets = shared_targets(place)
    entropy = -(targets * targets.clamp(min=1e-30).log()).sum(1).mean().item()
    assert infonce(image, text, 100.0, targets=targets).item() - entropy == pytest.approx(0, abs=1e-6)


def test_null_is_encoded_with_the_weights_of_the_moment():
    """Card: the image tower has a gradient even if the whole batch is NULL, and NULL's row moves."""
    encoder = with_null()
    loss = step(encoder, rows(0, ALONE))
    loss.backward()
    assert encoder.visual.stem.projection.weight.grad.abs().sum() > 0
    x, _ = coloured(4)
    method = quick(TIPCLIP, encoder=clip_shaped(), non_visual=ALONE, lr=1e-3).fit(x, CAPTIONS)
    null = method.encoder_.preprocess.normalize(method.encoder_.null.numpy())[None]
    assert not torch.allclose(method.encoder_.images(null), clip_shaped().images(null), atol=1e-4)
    assert method.encoder_.logit_scale != clip_shaped().logit_scale, "the temperature learns"


# -- NULL --------------------------------------------------------------------------------------------------------------


def test_null_is_random_and_written_and_read_bit_for_bit(tmp_path):
    encoder, (x, _) = clip_shaped(), coloured(4)
    method = quick(TIPCLIP, encoder=encoder, non_visual=ALONE, alpha=0.3).fit(x, CAPTIONS)
    null = method.encoder_.null
    assert (null.dtype, tuple(null.shape)) == (torch.uint8, (16, 16, 3))
    assert 110 < null.double().mean() < 145
    assert null.double().std() > 60
    path = method.save(tmp_path / "a.safetensors")
    assert torch.equal(load_file(path)["null"], null)
    again = TIPCLIP.load(path, encoder=encoder)
    assert torch.equal(again.encoder_.null, null)
    np.testing.assert_array_equal(again.visualness(ALONE), method.visualness(ALONE))
    other = quick(TIPCLIP, encoder=encoder, non_visual=ALONE, seed=1).fit(x, CAPTIONS)
    assert not torch.equal(other.encoder_.null, null)
    assert not hasattr(method.merge(), "null")
    assert not hasattr(encoder, "null")


def test_a_second_stage_keeps_the_first_ones_null():
    x, _ = coloured(4)
    first = quick(TIPCLIP, encoder=clip_shaped(), non_visual=ALONE, seed=4).fit(x, CAPTIONS)
    second = quick(TIPCLIP, encoder=first.encoder_, non_visual=ALONE[:2], seed=5).fit(x, CAPTIONS)
    assert torch.equal(second.encoder_.null, first.encoder_.null)
    assert not np.array_equal(second.visualness(ALONE), first.visualness(ALONE))


# -- the score ---------------------------------------------------------------------------------------------------------


def test_the_score_is_one_minus_the_cosine_and_the_threshold_is_above_it():
    x, _ = coloured(4)
    method = quick(TIPCLIP, encoder=clip_shaped(), non_visual=ALONE, lr=1e-3).fit(x, CAPTIONS)
    texts = CAPTIONS + ALONE
    null = method.encoder_.images(method.encoder_.preprocess.normalize(method.encoder_.null.numpy())[None])[0]
    cosine = (method.encoder_.texts(texts) @ null).numpy()
    scores = method.visualness(texts)
    np.testing.assert_allclose(scores, 1 - cosine, atol=1e-6)
    assert ((scores >= 0) & (scores <= 2)).all()
    cut = float(np.median(scores))
    np.testing.assert_array_equal(method.set_params(threshold=cut).is_visual(texts), cosine < 1 - cut)
    labels = [1] * 4 + [0] * 4
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, -cosine))


def test_the_best_threshold_has_the_highest_macro_f1_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.random(30) < 0.4
        scores = np.round(rng.normal(size=30) + labels, 1)  # with ties
        found = best_threshold(scores, labels)
        cuts = [(a + b) / 2 for a, b in zip(np.unique(scores), np.unique(scores)[1:], strict=False)]
        each = [f1_score(labels, scores > cut, average="macro") for cut in cuts]
        assert f1_score(labels, scores > found, average="macro") == pytest.approx(max(each))
        assert found == pytest.approx(cuts[int(np.argmax(np.round(each, 12)))])
    with pytest.raises(ClipworksError, match="labels must hold both kinds"):
        best_threshold([0.1, 0.2], [1, 1])
    with pytest.raises(ClipworksError, match="scores must differ"):
        best_threshold([0.1, 0.1], [0, 1])


# -- mining ------------------------------------------------------------------------------------------------------------


def test_mining_is_strict_at_its_borders():
    table = [[0.35, 0.1], [0.36, 0.1], [0.18, 0.0], [0.179, 0.179], [0.1, 0.9], [0.3, 0.2]]
    assert mine(table).tolist() == [UNSURE, 0, UNSURE, NULL, 1, UNSURE]
    assert mine(np.empty((3, 0))).tolist() == [UNSURE] * 3, "a page without images says nothing"
    assert mine([[0.2]], above=0.15, below=0.1).tolist() == [0]
    with pytest.raises(ClipworksError, match="below must not exceed above"):
        mine(table, above=0.1)
    with pytest.raises(ClipworksError, match="similarity must have the shape"):
        mine([0.1])


def test_pages_give_pairs_and_texts_alone():
    encoder, x = clip_shaped(), [np.full((20, 20, 3), 70 * i, np.uint8) for i in range(3)]
    pages = [(CAPTIONS, x[:2]), (ALONE, x[2:]), (["a cat"], []), ([], x)]
    cosines = [encoder.texts(texts) @ encoder.images(images).T for texts, images in pages[:2]]
    high = max(float(c.max()) for c in cosines) - 1e-4
    low = min(float(c.max(1).values.min()) for c in cosines) + 1e-4
    images, texts, alone = mine_pages(pages, encoder, above=high, below=low, progress=False)
    assert len(images) == len(texts) == 1
    place = next(i for i, c in enumerate(cosines) if float(c.max()) > high)
    row, column = divmod(int(cosines[place].argmax()), cosines[place].shape[1])
    assert texts == [pages[place][0][row]]
    assert images[0] is pages[place][1][column]
    assert len(alone) == 1


# -- training ----------------------------------------------------------------------------------------------------------

COLOURS, THINGS = ("red", "green", "blue"), ("sheet", "wall", "cloth")
FUNCTION = ("although", "hence", "moreover", "likewise", "therefore", "perhaps")


@pytest.mark.parametrize("seed", [0, 1])
def test_words_with_images_are_told_from_words_without(seed):
    """Card: of concrete and of function words, in mixtures that were not learned; images are still found, and another
    NULL does as well."""
    x, y = coloured(24)
    pairs = [f"{a} {b}" for a in FUNCTION for b in FUNCTION if a != b]
    seen = [f"{COLOURS[c]} {THINGS[(c + i) % 2 + (c == 2)]}" for i, c in enumerate(y)]
    visual = sorted({f"{a} {b}" for a in COLOURS for b in THINGS} - set(seen))
    assert len(visual) == 3
    settings = {"encoder": clip_shaped(), "lr": 2e-3, "epochs": 15, "batch_size": 24, "seed": seed, "names": COLOURS}
    method = quick(TIPCLIP, non_visual=pairs[::2] + pairs[1::4], templates="{} sheet", **settings).fit(x, seen)
    alone = pairs[3::4]
    scores = method.visualness([*visual, *alone])
    assert auroc(scores, [1] * len(visual) + [0] * len(alone)) > 0.95
    held, classes = coloured(30, seed=7)
    assert np.mean(method.predict(held) == [COLOURS[c] for c in classes]) > 0.9


def test_texts_from_a_file_and_labels_as_sentences(tmp_path):
    x, y = coloured()
    (tmp_path / "alone.txt").write_text("nevertheless\n\nthis was decided\n", encoding="utf-8")
    settings = {"encoder": clip_shaped(), "lr": 1e-3}
    by_file = quick(TIPCLIP, non_visual=str(tmp_path / "alone.txt"), **settings).fit(x, y)
    by_list = quick(TIPCLIP, non_visual=["nevertheless", "this was decided"], **settings).fit(x, y)
    np.testing.assert_array_equal(by_file.visualness(ALONE), by_list.visualness(ALONE))
    for given, says in (("no.txt", "non_visual must be a list of texts or a text file"), ([7], "must hold texts")):
        with pytest.raises(ClipworksError, match=says):
            quick(TIPCLIP, non_visual=given, **settings).fit(x, y)


def test_from_a_shell(tmp_path, capsys):
    for name, value in (("cat", 30), ("dog", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((20, 20, 3), value + k, np.uint8)).save(tmp_path / "data" / name / f"{k}.png")
    (tmp_path / "alone.txt").write_text("nevertheless\nthis was decided, however\n", encoding="utf-8")
    model, out = save(clip_shaped(), tmp_path / "toy.safetensors"), tmp_path / "out.safetensors"
    words = ["tune", str(tmp_path / "data"), "--method", "tip-clip", "--out", str(out), "--model", str(model)]
    options = [
        "--non-visual",
        str(tmp_path / "alone.txt"),
        "--shots",
        "2",
        "--epochs",
        "1",
        "--threshold",
        "0.8",
        "--json",
    ]
    assert main([*words, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["threshold"] == 0.8
    assert found["images"] == 4
    assert TIPCLIP.load(out, encoder=str(model)).visualness(NAMES).shape == (3,)


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not COCO.is_dir(), reason="the data is not beside the checkout")
def test_captions_are_told_from_the_sentences_of_this_projects_own_documents():
    """The bundled model: other captions and other documents than it learned from; split by document."""
    rows = [(row["file"], row["captions"][0]) for row in json.loads((COCO / "coco_mini.json").read_text())
            if row["captions"]]  # fmt: skip
    paths, captions = [str(COCO / file) for file, _ in rows], [text for _, text in rows]
    learned, held = (sentences(*files) for files in (("LICENSE", "SECURITY.md"), ("CONTRIBUTING.md",)))
    half = min(len(captions) // 2, 48)
    settings = {"non_visual": learned[:half], "epochs": 2, "batch_size": 32}
    texts, labels = captions[half : 2 * half] + held, [1] * half + [0] * len(held)
    scores = {}
    for lr in (0.0, 5e-5):
        method = TIPCLIP(encoder=clipworks.load(), lr=lr, **settings).fit(paths[:half], captions[:half])
        scores[lr] = auroc(method.visualness(texts), labels)
    assert scores[5e-5] > max(scores[0.0], 0.95)


def sentences(*files):
    """Lines of prose of a project's documents."""
    lines = [line.strip() for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if len(line.split()) > 5 and line[0].isalpha()]
