"""The ring: one process is the plain loss; two and three have its value and its gradient once averaged."""

import socket

import pytest
import torch
import torch.distributed as dist

from clipworks.errors import ClipworksError
from clipworks.losses.sigmoid import sigmoid
from clipworks.losses.sigmoid_ring import sigmoid_ring

from .oracle import assert_gradient, assert_safe, pair


def test_alone_it_is_the_plain_loss():
    image, text = pair(7)
    assert sigmoid_ring(image, text, 12.0, -5.0).item() == pytest.approx(sigmoid(image, text, 12.0, -5.0).item())
    assert_gradient(sigmoid_ring, image, text, torch.tensor(3.0), torch.tensor(-2.0))
    assert_safe(lambda scale, i, t: sigmoid_ring(i, t, scale), *pair())


def _inputs():
    return [*pair(12), torch.tensor(12.0).double(), torch.tensor(-5.0).double()]


def _work(rank, count, port, frozen, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    each = 12 // count
    mine = slice(rank * each, (rank + 1) * each)
    image, text, scale, bias = _inputs()
    leaves = [image[mine].clone(), text[mine].clone(), scale, bias]
    for k, leaf in enumerate(leaves):
        leaf.requires_grad_(not (frozen and k == 1))
    value = sigmoid_ring(*leaves)
    value.backward()
    gradients = [None if leaf.grad is None else leaf.grad for leaf in leaves]
    torch.save({"value": value.detach(), "gradients": gradients}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("count", "frozen"), [(3, False), pytest.param(2, False, marks=pytest.mark.slow),
                          pytest.param(2, True, marks=pytest.mark.slow)]
)  # fmt: skip
def test_processes_in_a_ring_are_one(count, frozen, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_work, (count, port, frozen, str(tmp_path)), nprocs=count)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    inputs = [x.requires_grad_() for x in _inputs()]
    whole = sigmoid(*inputs)
    expected = torch.autograd.grad(whole, inputs)
    assert torch.stack([f["value"] for f in found]).mean().item() == pytest.approx(whole.item(), abs=1e-12)
    for k in range(4):
        parts = [f["gradients"][k] for f in found]
        if frozen and k == 1:
            assert parts == [None] * count
            continue
        # rows of the encoders lie one after another; the scale and the bias are averaged, like everything
        got = torch.cat(parts) / count if parts[0].ndim else torch.stack(parts).mean()
        assert torch.allclose(got, expected[k], atol=1e-12, rtol=0)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="text must have the shape of image"):
        sigmoid_ring(torch.ones(4, 3), torch.ones(4, 2), 1.0)
