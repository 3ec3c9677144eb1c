"""Gathering over processes against one process that holds the whole batch, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from clipworks.training.gather import full_matrix, gather, local_rows, mean_over_processes, processes, rank

from .toy import Pair, gradients, infonce, vectors
from .toy import spawn as assert_in_processes

ROWS = 4  # per process


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """All-gather without gradient: the own rows carry none either."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def _local_rows_plain(loss, image, text, scale):
    return loss(image, text, scale, all_image=_plain(image), all_text=_plain(text), offset=rank() * len(image))


def _full_matrix_plain(loss, image, text, scale):
    def own(rows):
        every = _plain(rows)
        every[rank() * len(rows) : (rank() + 1) * len(rows)] = rows
        return every

    return loss(own(image), own(text), scale)


VARIANTS = {"local": local_rows, "full": full_matrix, "plain": _local_rows_plain, "reinserted": _full_matrix_plain}


def _run(variant: str, count: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and data-parallel gradients (mean over processes) of one variant."""
    model, batch = Pair(), vectors(ROWS * count)
    mine = {name: value[rank() * ROWS : (rank() + 1) * ROWS] for name, value in batch.items()}
    found = model(mine)
    loss = VARIANTS[variant](infonce, found["image"], found["text"], found["scale"])
    loss.backward()
    return mean_over_processes(loss).item(), {n: mean_over_processes(g) for n, g in gradients(model).items()}


def _single(count: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = Pair()
    found = model(vectors(ROWS * count))
    loss = infonce(found["image"], found["text"], found["scale"])
    loss.backward()
    return loss.item(), gradients(model)


def _assert_same_gradients(number: int, count: int) -> None:
    assert (processes(), rank()) == (count, number)
    value, expected = _single(count)
    for variant in ("local", "full"):
        loss, got = _run(variant, count)
        assert abs(loss - value) < 1e-12, variant
        for name, gradient in expected.items():
            assert torch.allclose(got[name], gradient, rtol=0, atol=1e-12), (variant, name)
    # own block put back with gradient: encoders get 1/W of the gradient, the scale all of it
    loss, got = _run("reinserted", count)
    assert abs(loss - value) < 1e-12
    for name, gradient in expected.items():
        share = 1.0 if name == "log_scale" else 1 / count
        assert torch.allclose(got[name], share * gradient, rtol=0, atol=1e-12), name
    # gather without gradient: another direction, so the comparison above can fail
    loss, got = _run("plain", count)
    assert abs(loss - value) < 1e-12
    name = "text.weight"
    cosine = torch.nn.functional.cosine_similarity(got[name].flatten(), expected[name].flatten(), dim=0)
    assert cosine < 0.999
    assert not torch.allclose(got[name], expected[name], rtol=1e-3, atol=1e-3)
    ranks = gather(torch.full((2, 3), float(number)))
    assert ranks[:, 0].tolist() == [float(r) for r in range(count) for _ in range(2)]


def test_two_processes_have_the_gradients_of_one():
    assert_in_processes(_assert_same_gradients, 2)


@pytest.mark.slow
def test_four_processes_have_the_gradients_of_one():
    assert_in_processes(_assert_same_gradients, 4)


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather(rows) is rows
    assert (processes(), rank()) == (1, 0)
