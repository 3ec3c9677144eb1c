"""The online contrastive loss: loops, batches in order, one-sided batches, and what is refused."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.online_contrastive import online_contrastive

from .oracle import pair

A, _ = pair(9, 4)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4])


def _oracle(x, labels, margin):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(1 - x[i] @ x[j], labels[i] == labels[j]) for i in range(len(x)) for j in range(i)]
    near, far = [d for d, same in pairs if same], [d for d, same in pairs if not same]
    return (sum(d**2 for d in near if d > min(far))
            + sum(max(margin - d, 0) ** 2 for d in far if d < max(near)))  # fmt: skip


@pytest.mark.parametrize("margin", [0.2, 0.8])
def test_against_loops(margin):
    found = online_contrastive(3 * A, LABELS, margin).item()
    assert found == pytest.approx(_oracle(A.numpy(), LABELS.numpy(), margin), abs=1e-9)
    assert found > 0


def test_nothing_is_selected_when_all_duplicates_are_nearer_than_all_others():
    rows = (torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2]] + 0.01 * pair(5, 3)[0]).requires_grad_()
    loss = online_contrastive(rows, torch.tensor([0, 0, 1, 1, 2]))
    loss.backward()
    assert loss.item() == 0
    assert (rows.grad == 0).all()


def test_a_batch_of_one_kind_has_no_loss():
    assert online_contrastive(A, torch.zeros(9, dtype=torch.long)).item() == 0
    assert online_contrastive(A, torch.arange(9)).item() == 0
    assert online_contrastive(A[:1], torch.arange(1)).item() == 0


def test_gradient_against_differences():
    rows = A.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: online_contrastive(x, LABELS, 0.8), (rows,))


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="labels must be 9 integers"):
        online_contrastive(A, LABELS[:2])
    with pytest.raises(ClipworksError, match="margin must lie in"):
        online_contrastive(A, LABELS, -1.0)
