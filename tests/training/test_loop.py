"""The loop: what it computes, whatever the number of pieces and processes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.data.item import Item
from clipworks.errors import ClipworksError
from clipworks.training.augment import Augment
from clipworks.training.feed import Order
from clipworks.training.log import read_log
from clipworks.training.loop import train
from clipworks.training.recipe import ContrastiveRecipe

from .toy import CLASSES, drawings, infonce, spawn, tiny, weights

QUICK = {"loss": infonce, "steps": 5, "batch_size": 8, "lr": 1e-3, "log_every": 1, "workers": 1, "device": "cpu"}


def _train(out, encoder=None, **changes):
    return train(drawings(24), tiny() if encoder is None else encoder, out=out, **{**QUICK, **changes})


def _losses(out):
    return [line["loss"] for line in read_log(out / "log.jsonl")]


def _assert_close(one, other, tolerance):
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(other)[name], rtol=0, atol=tolerance), name


def test_steps_follow_a_loop_written_out(tmp_path):
    """AdamW, warm-up, cosine, clipping, clamp and groups, by hand on the same batches."""
    encoder = tiny(double=True)
    got = _train(tmp_path, encoder, augment="none", warmup=2, clip=0.5, weight_decay=0.3, max_scale=14.3)
    model, pairs = tiny(double=True), drawings(24)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    losses = []
    for step in range(5):
        rows = Order(24, 8, 0).rows(step)
        pixels = torch.stack([model.preprocess(pairs[r][0]) for r in rows]).double()
        tokens = model.tokenize([pairs[r][1] for r in rows])
        loss = infonce(model.encode_image(pixels), model.encode_text(tokens), model.log_scale.exp())
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        share = (step - 2) / 3
        lr = 1e-3 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * share)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad * min(1.0, 0.5 / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.98).add_(0.02 * gradient**2)
                if p.ndim >= 2:
                    p.mul_(1 - lr * 0.3)
                root = (second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6
                p.sub_(lr * first / (1 - 0.9 ** (step + 1)) / root)
            model.log_scale.clamp_(0, math.log(14.3))
    assert np.allclose(_losses(tmp_path), losses, rtol=0, atol=1e-12)
    _assert_close(got.encoder, model, 1e-12)
    _assert_close(encoder, tiny(double=True), 0)  # the encoder that was given is as it was


@pytest.mark.parametrize("micro_batch", [3, 4, 8])
def test_pieces_are_exactly_the_large_batch(tmp_path, micro_batch):
    whole = _train(tmp_path / "whole", tiny(double=True))
    pieces = _train(tmp_path / "pieces", tiny(double=True), micro_batch=micro_batch)
    assert np.allclose(_losses(tmp_path / "whole"), _losses(tmp_path / "pieces"), rtol=0, atol=1e-11)
    _assert_close(whole.encoder, pieces.encoder, 1e-11)


def _in_process(rank, count, out, changes):
    _train(out, tiny(double=True), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 3, "ema": 0.5, "clip": 0.1, "augment": "strong"},
        {"distributed": "fsdp", "micro_batch": 3, "clip": 0.1},
        pytest.param({"loss": "sigmoid", "micro_batch": 3}, marks=pytest.mark.slow),
        pytest.param({"loss": "sigmoid_ring", "micro_batch": 3}, marks=pytest.mark.slow),
        pytest.param({"recipe": "m2_mix(weight=0.5, both=0.1)"}, marks=pytest.mark.slow),
        pytest.param({"recipe": "clip_refine", "micro_batch": 3}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "pieces", "fsdp", "sigmoid", "ring", "m2_mix", "clip_refine"],
)
def test_two_processes_train_as_one(tmp_path, changes):
    labelled = [Item(str(i), image, caption, caption) for i, (image, caption) in enumerate(drawings(7, seed=3))]
    changes = {**changes, "validation": labelled, "templates": "{}", "evaluate_every": 2}
    spawn(_in_process, 2, tmp_path / "two", changes)
    one = _train(tmp_path / "one", tiny(double=True), **{**changes, "distributed": "ddp"})
    logs = [[{k: v for k, v in line.items() if k not in ("pairs_per_second", "data_wait")} for line in
             read_log(tmp_path / n / "log.jsonl")] for n in ("one", "two")]  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 5 + 1 + 3
    for single, double in zip(*logs, strict=True):
        assert single == pytest.approx(double, rel=0, abs=1e-10)
    two = tiny(double=True)
    from safetensors.torch import load_file

    step = load_file(tmp_path / "two" / "checkpoints" / "step-000000005.safetensors")
    two.load_state_dict({n: step[f"model.encoder.{n}"].reshape(v.shape) for n, v in two.state_dict().items()})
    _assert_close(one.encoder, two, 1e-10)
    assert not torch.equal(two.visual.positions, tiny(double=True).visual.positions)


def _fsdp_in_halves(rank, count, out):
    for name, first in (("cut", "fsdp"), ("mixed", "ddp")):
        with pytest.raises(RuntimeError, match="stop"):
            _train(out / name, distributed=first, save_every=2, recipe=_Stopping(4), ema=0.5)
        report = _train(out / name, distributed="fsdp", save_every=2, recipe=_Stopping(99), ema=0.5)
        assert report.resumed_from == 4
    whole = _train(out / "whole", distributed="fsdp", save_every=2, recipe=_Stopping(99), ema=0.5)
    _assert_close(report.encoder, whole.encoder, 1e-6)  # sharding may begin in the middle of a run


class _Stopping(ContrastiveRecipe):
    def __init__(self, calls):
        super().__init__(infonce, Augment())
        self.calls = calls

    def losses(self, features):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("stop")
        return super().losses(features)


@pytest.mark.slow
def test_sharded_run_resumes_bit_equal(tmp_path):
    spawn(_fsdp_in_halves, 2, tmp_path)
    names = ("model.safetensors", "ema.safetensors", "checkpoints/step-000000005.safetensors")
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    encoder, files = tiny(), []
    state = torch.get_rng_state()
    for number, seed in enumerate((1, 1, 2)):
        _train(tmp_path / str(number), encoder, seed=seed, augment="strong", steps=2)
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_keeps_float32_weights(tmp_path):
    report = _train(tmp_path / "b", precision="bf16")
    exact = _train(tmp_path / "f")
    assert all(p.dtype == torch.float32 for p in report.encoder.parameters())
    assert report.losses["loss"] == pytest.approx(exact.losses["loss"], rel=0.05)
    assert report.losses["loss"] != exact.losses["loss"]


def test_scale_is_clamped_after_every_step(tmp_path):
    up = _train(tmp_path / "up", tiny(init_log_scale=4.0), lr=50.0, warmup=0, steps=1, clip=1.0)
    assert up.encoder.logit_scale <= 100.0 + 1e-4
    assert up.encoder.logit_scale >= 1.0


def test_frozen_parts_stay_bit_equal(tmp_path):
    report = _train(tmp_path, freeze=["text.*", "*.positions"], layer_decay=0.5)
    before, after = weights(tiny()), weights(report.encoder)
    for name, value in before.items():
        frozen = name.startswith("text.") or name.endswith(".positions")
        assert torch.equal(value, after[name]) == frozen, name


def test_a_rate_of_zero_keeps_a_part_and_a_tenth_moves_it_a_tenth_as_far(tmp_path):
    """The first step of Adam is as long as the rate, whatever the gradient."""
    still = _train(tmp_path / "still", rates={"text.*": 0.0}, steps=2, weight_decay=0.0)
    assert all(torch.equal(v, weights(still.encoder)[n]) == n.startswith("text.") for n, v in weights(tiny()).items())
    moved = {}
    for name, rates in (("whole", None), ("tenth", {"visual.*": 0.1})):
        report = _train(tmp_path / name, rates=rates, steps=1, weight_decay=0.0, warmup=0)
        moved[name] = {n: (weights(report.encoder)[n] - v).abs().max().item() for n, v in weights(tiny()).items()}
    for name, far in moved["whole"].items():
        assert moved["tenth"][name] == pytest.approx(far * (0.1 if name.startswith("visual.") else 1), rel=0.02), name


def test_moving_average_is_saved_beside(tmp_path):
    from safetensors.torch import load_file

    report = _train(tmp_path, ema=0.0, validation=drawings(6, seed=2), evaluate_every=5)
    final = load_file(tmp_path / "checkpoints" / "step-000000005.safetensors")
    for name, value in report.encoder.state_dict().items():
        assert torch.equal(final[f"ema.encoder.{name}"], value)  # decay 0 copies
    assert report.metrics["ema_image_to_text_recall@1"] == report.metrics["image_to_text_recall@1"]
    assert (tmp_path / "ema.safetensors").exists()


class Whole(nn.Module):
    """A recipe that cannot be split, with a parameter of its own and a choice of captions."""

    def __init__(self):
        super().__init__()
        self.plain = ContrastiveRecipe(infonce)
        self.gate = nn.Parameter(torch.ones(32))
        self.seen = []

    def bind(self, encoder, pool):
        self.plain.bind(encoder, pool)

    def batch(self, items, step, rng):
        draws = rng.spawn(len(items))
        first = ["the" if draw.random() < 0.5 else "a" for draw in draws]
        words = [f + item.caption.removeprefix("a") for f, item in zip(first, items, strict=True)]
        self.seen.append(words)
        return {"pixels": self.plain.pixels(items, draws), "tokens": self.plain.bound.tokenize(words)}

    def forward(self, encoder, batch):
        features = self.plain.features(encoder, batch)
        gated = {**features, "image": features["image"] * self.gate}
        return {"pair": self.plain.losses(gated)["infonce"], "size": 0.1 * self.gate.square().mean()}


def test_a_recipe_plugs_in(tmp_path):
    from safetensors.torch import load_file

    recipe = Whole()
    report = _train(tmp_path, recipe=recipe)
    assert len(recipe.seen) == 5
    assert {words.split()[0] for batch in recipe.seen for words in batch} == {"the", "a"}
    assert set(report.losses) == {"loss", "pair", "size"}
    assert report.losses["loss"] == pytest.approx(report.losses["pair"] + report.losses["size"])
    final = load_file(tmp_path / "checkpoints" / "step-000000005.safetensors")
    assert not torch.equal(final["model.recipe.gate"], torch.ones(32))
    with pytest.raises(ClipworksError, match="Whole is not"):
        _train(tmp_path / "pieces", recipe=Whole(), micro_batch=2)


def test_log_report_and_tensorboard(tmp_path):
    report = _train(tmp_path, validation=drawings(9, seed=4), evaluate_every=2, tensorboard=True)
    lines = read_log(tmp_path / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert {"lr", "scale", "gradient_norm", "pairs_per_second", "data_wait"} <= set(steps[0])
    assert [line["step"] for line in lines if "text_to_image_recall@5" in line] == [0, 2, 4, 5]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.as_dict()))
    assert saved["before"].keys() == saved["metrics"].keys()
    assert 0 <= saved["wait_share"] <= 1
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_diverging_run_says_so(tmp_path):
    def nan(image, text, scale):
        return infonce(image, text, scale) * float("nan")

    with pytest.raises(ClipworksError, match=r"the loss is nan at step 1\. Lower lr"):
        _train(tmp_path, loss=nan)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": "cosin"}, "schedule must be one of .* Did you mean 'cosine'"),
        ({"precision": "fp16"}, "precision must be one of 'fp32', 'bf16'"),
        ({"augment": "ligth"}, "augment must be one of .* Did you mean 'light'"),
        ({"batch_size": 25}, r"batch_size must lie in \[1, 24\]"),
        ({"freeze": ["visul.*"]}, "Nothing matches 'visul"),
        ({"steps": 0}, "steps must lie in"),
        ({"distributed": "fsdp"}, "needs several processes"),
        ({"ema": 1.2}, "decay must lie in"),
        ({"names": ["cat"], "validation": drawings(2)}, "names need labels"),
    ],
)
def test_mistakes_are_named(tmp_path, change, says):
    with pytest.raises(ClipworksError, match=says):
        _train(tmp_path, **change)


class SameWords(ContrastiveRecipe):
    """Rows of a batch with the same caption are all right answers: few classes make many of them."""

    def __init__(self):
        super().__init__(same_words)

    def batch(self, items, step, rng):
        places = {words: i for i, words in enumerate(sorted({item.caption for item in items}))}
        return super().batch(items, step, rng) | {"group": torch.tensor([places[item.caption] for item in items])}

    def features(self, encoder, batch):
        return super().features(encoder, batch) | {"group": batch["group"]}


def same_words(image, text, scale, group):
    target = (group[:, None] == group).float()
    target /= target.sum(1, keepdim=True)
    logits, cross = scale * image @ text.T, nn.functional.cross_entropy
    return (cross(logits, target) + cross(logits.T, target)) / 2


def test_classes_of_coloured_shapes_are_learned(tmp_path):
    """Eight classes of colour and shape reach 100 % zero-shot on fresh drawings (chance 12.5 %)."""
    fresh = enumerate(drawings(400, 7))
    held = [Item(str(i), image, label=words.removeprefix("a photo of a ")) for i, (image, words) in fresh]
    options = {"validation": held, "names": CLASSES, "templates": "a photo of a {}", "evaluate_every": 999}
    report = train(drawings(1600), tiny(), out=tmp_path, recipe=SameWords(), epochs=5, batch_size=32, lr=2e-3,
                   device="cpu", **options)  # fmt: skip
    assert report.before["zeroshot_accuracy"] < 40
    assert report.metrics["zeroshot_accuracy"] >= 99.5  # 100 where it was written; rounding may move one drawing


def test_without_a_folder_it_trains_alike_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = _train(None)
    assert (report.out, report.model) == (None, None)
    assert not list(tmp_path.iterdir())
    _assert_close(report.encoder, _train(tmp_path / "run").encoder, 0)
