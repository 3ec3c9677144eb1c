"""A killed run goes on bit for bit: one and two processes, a damaged newest checkpoint, Ctrl-C."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipworks.errors import ClipworksError
from clipworks.training.checkpoint import checkpoints
from clipworks.training.log import read_log
from clipworks.training.loop import train

from .toy import drawings, infonce, tiny

STEPS = 60
TIMES = ("pairs_per_second", "data_wait")


def _start(out: Path, count: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = [[str(r), str(count), str(port)] for r in range(count)] if count > 1 else [[]]
    script = str(Path(__file__).with_name("killed.py"))
    return [
        subprocess.Popen(
            [sys.executable, script, str(out), *p], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
        )
        for p in process
    ]


def _finish(running: list[subprocess.Popen]) -> None:
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]


def _kill_at(running: list[subprocess.Popen], out: Path, step: int) -> None:
    """Kill the last process once the log has reached a step."""
    until = time.monotonic() + 90
    while not any(line["step"] >= step for line in read_log(out / "log.jsonl")):
        assert time.monotonic() < until
        assert running[-1].poll() is None, running[-1].stderr.read().decode()[-2000:]
        time.sleep(0.01)
    running[-1].send_signal(signal.SIGKILL)


def _curve(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_log(out / "log.jsonl")]


def _same(one: Path, other: Path) -> None:
    assert len(_curve(one)) == STEPS
    assert _curve(one) == _curve(other)
    for name in ("model.safetensors", "ema.safetensors", f"checkpoints/step-{STEPS:09d}.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("count", "kills"),
    [
        pytest.param(1, 1),
        pytest.param(2, 1),
        pytest.param(1, 5, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_steps_ends_bit_equal(tmp_path, count, kills, record_property):
    whole = _start(tmp_path / "whole", count)
    draw = random.Random()
    for step in sorted(draw.sample(range(4, STEPS - 12), kills)):
        running = _start(tmp_path / "killed", count)
        _kill_at(running, tmp_path / "killed", step)
        began = time.monotonic()
        for process in running:  # one is dead; the others must notice, and say so
            process.communicate(timeout=60)
            assert process.returncode != 0, f"killed at {step}"
        assert time.monotonic() - began < 40
        assert not (tmp_path / "killed" / "model.safetensors").exists(), "ended before the kill"
    record_property("injected", kills)
    _finish(_start(tmp_path / "killed", count))
    _finish(whole)
    _same(tmp_path / "whole", tmp_path / "killed")


def _small(out, steps=12, **changes):
    options = {"loss": infonce, "steps": steps, "batch_size": 8, "lr": 1e-3, "save_every": 4, "log_every": 1, "keep": 3}
    return train(drawings(24), tiny(), out=out, **{**options, **changes})


class _Stops:
    """A loss that ends the process's work after some calls, in the middle of a step."""

    def __init__(self, calls, error):
        self.calls, self.error, self.__name__ = calls, error, "infonce"

    def __call__(self, image, text, scale):
        self.calls -= 1
        if self.calls < 0:
            self.error()
        return infonce(image, text, scale)


def _die():
    raise RuntimeError("power cut")


def test_damaged_newest_checkpoint_falls_back_and_ends_bit_equal(tmp_path):
    _small(tmp_path / "whole", loss=_Stops(100, _die))
    with pytest.raises(RuntimeError, match="power cut"):
        _small(tmp_path / "cut", loss=_Stops(10, _die))
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[0].with_suffix(".safetensors")
    assert newest.name == "step-000000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"\0" * 7)
    with pytest.warns(UserWarning, match=r"step-000000008.json is damaged .*SHA-256.*trying the one before"):
        report = _small(tmp_path / "cut", loss=_Stops(100, _die))
    assert report.resumed_from == 4
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert _curve(tmp_path / "cut") == _curve(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_under_way(tmp_path, number):
    with pytest.raises(KeyboardInterrupt):
        _small(tmp_path / "cut", loss=_Stops(5, lambda: signal.raise_signal(number)))
    assert checkpoints(tmp_path / "cut" / "checkpoints")[0].name == "step-000000006.json"
    assert _small(tmp_path / "cut", loss=_Stops(100, _die)).resumed_from == 6
    _small(tmp_path / "whole", loss=_Stops(100, _die))
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = _small(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    again = _small(tmp_path, loss=infonce)
    assert again.resumed_from == 12
    assert again.losses == first.losses
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_another_run_in_the_folder_is_refused(tmp_path):
    _small(tmp_path)
    with pytest.raises(ClipworksError, match=r"lr differs from the run in .* began with 0.001, now 0.002"):
        _small(tmp_path, lr=2e-3)
    with pytest.raises(ClipworksError, match="out must be a new folder with resume='never'"):
        _small(tmp_path, resume="never")
