"""Search fine-tuning: both margins in numpy, their limits, what each way may change, what is gained and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipworks
from clipworks.cli.main import main
from clipworks.data.labelled import read_labelled
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.metrics.retrieval import image_retrieval
from clipworks.tuning.margin import arc_margin, caption_margin, widened
from clipworks.tuning.retrieval_finetuning import WAYS, MarginRecipe, RetrievalFinetuning
from clipworks.tuning.shots import labelled, listed_captions
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, bert_shaped, changed, clip_shaped, coloured, pixels, quick


def unit_rows(*shape, seed=0):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


Y = torch.tensor([0, 1, 2, 1, 0])


def test_the_margin_is_the_cosine_of_the_wider_angle_and_goes_on_falling():
    """Card: both branches agree to 1e-6; beyond pi - m the fallback keeps it monotone."""
    angle = torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64)
    for m in (0.0, 0.3, 0.5, 1.0):
        found = widened(angle.cos(), m)
        inside = angle + m < math.pi
        torch.testing.assert_close(found[inside], (angle[inside] + m).cos(), atol=1e-6, rtol=0)
        assert (found.diff() < 0).all(), "the wider the angle, the less"
    assert torch.isfinite(torch.autograd.grad(widened(ends := torch.tensor([1.0, -1.0], requires_grad=True), 0.3).sum(),
                                              ends)[0]).all()  # fmt: skip


def test_without_margin_it_is_cross_entropy_and_more_margin_costs_more():
    rows, centres = unit_rows(5, 8), unit_rows(3, 8, seed=1)
    assert arc_margin(rows, centres, Y, 20.0, 0.0).item() == pytest.approx(
        F.cross_entropy(20 * rows @ centres.T, Y).item(), rel=1e-9
    )
    values = [arc_margin(rows, centres, Y, 20.0, m).item() for m in (0.0, 0.1, 0.3, 0.6)]
    assert values == sorted(values)
    assert values[0] < values[-1]
    torch.testing.assert_close(arc_margin(rows, 7 * centres, Y), arc_margin(rows, centres, Y))


def test_arc_margin_is_the_formula():
    rows, centres, s, m = unit_rows(5, 8), unit_rows(3, 8, seed=1), 16.0, 0.4
    t = np.arccos(rows.numpy() @ centres.numpy().T)
    total = 0.0
    for i, y in enumerate(Y.tolist()):
        assert t[i, y] + m < np.pi
        right = np.exp(s * np.cos(t[i, y] + m))
        total -= np.log(right / (right + sum(np.exp(s * np.cos(t[i, c])) for c in range(3) if c != y)))
    assert arc_margin(rows, centres, Y, s, m).item() == pytest.approx(total / 5, rel=1e-9)


def test_caption_margin_is_the_formula():
    rows, captions, s, m = unit_rows(5, 8), unit_rows(5, 3, 8, seed=2), 9.0, 0.3
    u, e, y = rows.numpy(), captions.numpy(), Y.tolist()
    total = 0.0
    for i in range(5):
        wrong = sum(np.exp(s * u[i] @ e[j, k]) for j in range(5) if y[j] != y[i] for k in range(3))
        for k in range(3):
            angle = np.arccos(u[i] @ e[i, k]) + m
            assert angle < np.pi
            total -= np.log(np.exp(s * np.cos(angle)) / (np.exp(s * np.cos(angle)) + wrong))
    assert caption_margin(rows, captions, Y, s, m).item() == pytest.approx(total / 15, rel=1e-9)


def test_one_caption_without_margin_is_half_of_infonce():
    """Card: K = 1, m = 0 is the image-to-text half."""
    rows, texts = unit_rows(5, 8), unit_rows(5, 8, seed=3)
    found = caption_margin(rows, texts[:, None], torch.arange(5), 12.0, 0.0)
    half = F.cross_entropy(12.0 * rows @ texts.T, torch.arange(5))
    torch.testing.assert_close(found, half)
    other = F.cross_entropy(12.0 * texts @ rows.T, torch.arange(5))
    torch.testing.assert_close((found + other) / 2, infonce(rows, texts, 12.0))


def test_own_captions_and_those_of_the_class_are_no_wrong_answers():
    rows, captions = unit_rows(5, 8), unit_rows(5, 3, 8, seed=2)
    whole = caption_margin(rows, captions, Y)
    torch.testing.assert_close(caption_margin(rows, captions[:, [2, 0, 1]], Y), whole)
    changed_own, changed_class, changed_other = (captions.clone() for _ in range(3))
    changed_own[0, 1], changed_class[4], changed_other[1] = unit_rows(3, 8, seed=9)[0], unit_rows(3, 8, seed=9), 0
    terms = [_term(rows, c) for c in (captions, changed_own, changed_class, changed_other)]
    assert terms[0] == terms[1] == terms[2]
    assert terms[0] != terms[3]


def _term(rows, captions):
    """What stands before u_0 in the gradient of caption 0 of image 0: the derivative of their own term alone."""
    own = captions.clone().requires_grad_()
    (found,) = torch.autograd.grad(caption_margin(rows, own, Y, 9.0, 0.0), own)
    # it is a sum over images of number times u_i: image 0's own term, and where the others take it for a wrong answer
    return round(torch.linalg.lstsq(rows.T, found[0, 0]).solution[0].item(), 9)


def test_a_batch_of_one_class_has_no_wrong_caption_and_no_loss():
    rows = unit_rows(3, 8).requires_grad_()
    loss = caption_margin(rows, unit_rows(3, 2, 8, seed=1), torch.zeros(3, dtype=torch.long))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, rows)[0] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_changes_the_towers_it_names(way):
    encoder, (x, y) = clip_shaped(), coloured()
    method = quick(RetrievalFinetuning, encoder=encoder, way=way, lr=1e-3).fit(x, y)
    towers = {name.partition(".")[0] for name in changed(encoder, method.encoder_)}
    assert towers == ({"visual", "text"} if way in ("2sft", "mcip+") else {"visual"})


def test_learning_the_texts_anew_leaves_every_image_vector_as_it_is():
    """Card: image-image scores are bit-identical before and after, the key promise of 2SFT."""
    encoder, (x, y) = bert_shaped(), coloured()
    for first, second in (("gpr-ft", "2sft"), ("mcip", "mcip+")):
        one, two = (quick(RetrievalFinetuning, encoder=encoder, way=w, lr=1e-3).fit(x, y) for w in (first, second))
        assert torch.equal(one.vectors(x), two.vectors(x))
        assert not torch.equal(one.classifier_, two.classifier_)


def test_no_caption_reaches_the_text_tower_and_kept_vectors_are_fresh_ones():
    encoder, (x, y) = clip_shaped(), coloured(6)
    texts = [[f"a {NAMES[i]}", f"one {NAMES[i]} on grass"] for i in y]
    shots = labelled(list(x), y, NAMES)
    known = encoder.texts([t for own in texts for t in own]).unflatten(0, (6, 2))
    recipe = MarginRecipe(list(shots.table), known, 64.0, 0.3, 1.0)
    recipe.bind(encoder, None)
    batch = recipe.batch(shots.items[3:], 0, np.random.default_rng(0))
    torch.testing.assert_close(batch["known"][1, 1], encoder.texts([texts[4][1]])[0])
    found = recipe.forward(encoder, batch)
    sum(found.values()).backward()
    assert all(p.grad is None for p in encoder.text.parameters())
    assert encoder.visual.projection.weight.grad.abs().sum() > 0
    assert recipe.centres.grad.abs().sum() > 0


def test_captions_are_the_templates_or_what_was_given():
    shots = labelled(list(pixels(3)), np.array([0, 1, 1]), NAMES)
    assert listed_captions(None, shots, ["a {}.", "the {}."])[2] == ["a dog.", "the dog."]
    assert listed_captions(["x", "y", "z"], shots, []) == [["x"], ["y"], ["z"]]
    for bad in (["x"], "abc", [["x"], ["y", "z"], ["w"]], ["x", "y", " "], 3):
        with pytest.raises(ClipworksError, match="captions must hold"):
            listed_captions(bad, shots, [])
    x, y = coloured()
    plain, own = (quick(RetrievalFinetuning, encoder=clip_shaped(), lr=1e-3).fit(x, y, captions=c)
                  for c in (None, [f"number {i}" for i in range(12)]))  # fmt: skip
    assert changed(plain.encoder_, own.encoder_)
    for settings, says in (({"way": "mcipp"}, "Did you mean 'mcip'"), ({"scale": 0.0}, "scale must be above 0"),
                           ({"margin": 2.0}, "margin must lie")):  # fmt: skip
        with pytest.raises(ClipworksError, match=says):
            quick(RetrievalFinetuning, encoder=clip_shaped(), **settings).fit(x, y)


def test_images_are_found_better_and_words_are_kept_where_captions_hold_them():
    """Card's toy: search gains in every way; the margin alone does not serve the words, 2SFT and MCIP do."""
    rng = np.random.default_rng(0)
    y = np.arange(24) % 3
    x = torch.from_numpy(rng.normal(0, 1.2, (24, 3, 16, 16)).astype(np.float32))
    x[torch.arange(24), torch.from_numpy(y)] += 0.6
    held, answers = x[12:], y[12:]
    base = quick(RetrievalFinetuning, encoder=clip_shaped(), lr=0.0).fit(x[:12], y[:12])
    start = base.retrieval(held, answers, cutoffs=(1,)).mean_average_precision
    settings = {"encoder": clip_shaped(), "lr": 2e-3, "epochs": 40, "text_epochs": 40, "batch_size": 12,
                "layer_decay": None, "scale": 16.0}  # fmt: skip
    words = {}
    for way in WAYS:
        method = quick(RetrievalFinetuning, way=way, **settings).fit(x[:12], y[:12])
        assert method.retrieval(held, answers, cutoffs=(1,)).mean_average_precision > start + 0.1, way
        words[way] = method.score(held, answers)
    assert min(words["2sft"], words["mcip"], words["mcip+"]) >= base.score(held, answers)
    assert min(words["2sft"], words["mcip"], words["mcip+"]) > words["gpr-ft"]


def test_from_a_shell_search_is_measured_before_and_after(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, colour in (("red", (220, 30, 30)), ("blue", (40, 70, 230))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(5):
            noise = np.clip(np.array(colour) + rng.integers(-25, 25, (20, 20, 3)), 0, 255)
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    model = save(clip_shaped(), tmp_path / "toy.safetensors")
    out = str(tmp_path / "a.safetensors")
    words = ["tune", str(tmp_path / "set"), "--method", "retrieval-finetuning", "--out", out]
    options = ["--model", str(model), "--shots", "2", "--way", "2sft", "--epochs", "1", "--lr", "0.001", "--json"]
    assert main([*words, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = found["task"]
    assert {"zeroshot_accuracy", "image_to_image_map", "image_to_image_recall@1"} <= set(measured)
    again = RetrievalFinetuning.load(tmp_path / "a.safetensors", encoder=str(model))
    held = [p for n in ("blue", "red") for p in sorted((tmp_path / "set" / n).iterdir())]
    assert again.vectors(held).shape == (10, 8)


CALTECH = Path(__file__).parents[3] / "shared" / "data" / "caltech101-128"


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not CALTECH.is_dir(), reason="the data is not beside the checkout")
def test_real_images_are_found_better_by_images_and_by_words():
    """Six classes of Caltech-101, five images of each to learn, the bundled model: 2SFT."""
    data, draw, encoder = read_labelled("caltech101", CALTECH), np.random.default_rng(0), clipworks.load()
    counts = np.bincount(data.y, minlength=len(data.classes))
    chosen = draw.permutation(np.flatnonzero(counts >= 13))[:6]
    rows = np.stack([draw.permutation(np.flatnonzero(data.y == c))[:13] for c in chosen])
    names = [data.classes[c] for c in chosen]
    learned, held = ([data.items[i].source() for i in rows[:, part].ravel()] for part in (slice(5), slice(5, 13)))
    tuned = RetrievalFinetuning(names, encoder=encoder, way="2sft", lr=1e-4, epochs=3, text_epochs=3, batch_size=15,
                                augment="none").fit(learned, np.repeat(names, 5))  # fmt: skip
    answers, vectors = np.repeat(names, 8), encoder.images(held)
    words = class_vectors(names, encoder, templates=tuned.templates)
    right = np.mean([names[i] for i in (vectors @ words.T).argmax(1)] == answers)
    before = image_retrieval(vectors, answers).mean_average_precision
    assert tuned.retrieval(held, answers).mean_average_precision > before
    assert tuned.score(held, answers) >= right
