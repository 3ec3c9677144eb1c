"""Checkpoints under damage: what is on disk is a whole one or none."""

from __future__ import annotations

import json
import os

import pytest
import torch

from clipworks.training.checkpoint import checkpoints, newest_checkpoint, read_tensors, save_checkpoint


def _save(folder, step, keep=2):
    return save_checkpoint(folder, step, {"w": torch.full((4,), float(step))}, {"note": step}, keep)


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    state, weights = newest_checkpoint(tmp_path)
    assert (state["step"], state["note"]) == (3, 3)
    assert read_tensors(weights)["w"].tolist() == [3.0] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"step-{s:09d}.{ending}" for s in (2, 3) for ending in ("json", "safetensors")
    ]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: _flip(p.with_suffix(".safetensors")), "SHA-256"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b""), "bytes"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "No such file"),
        (lambda p: p.write_text("{"), "damaged"),
        (lambda p: p.write_text("[]"), "damaged"),
        (lambda p: p.write_text(json.dumps({"format": 99})), "format is 99"),
    ],
)
def test_damaged_newest_falls_back_with_a_message(tmp_path, damage, says):
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2))
    with pytest.warns(UserWarning, match=says):
        state, weights = newest_checkpoint(tmp_path)
    assert state["step"] == 1
    assert read_tensors(weights)["w"].tolist() == [1.0] * 4


def test_nothing_usable_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") is None
    _save(tmp_path, 1).with_suffix(".safetensors").unlink()
    with pytest.warns(UserWarning, match="trying the one before"):
        assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("at", [0, 1])
def test_death_between_the_writes_leaves_the_previous(tmp_path, monkeypatch, at):
    """The process dies at the first move (tensors) or at the second (JSON)."""
    _save(tmp_path, 1)
    moves, move = [], os.replace

    def die(source, target):
        moves.append(target)
        if len(moves) == at + 1:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path)[0]["step"] == 1
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000000001.json"]
    _save(tmp_path, 2)
    assert newest_checkpoint(tmp_path)[0]["step"] == 2
